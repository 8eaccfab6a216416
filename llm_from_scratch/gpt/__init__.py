"""The teaching API: a GPT to read, train and take apart, in few names."""

from llm_from_scratch.gpt.checkpoint import load_gpt
from llm_from_scratch.gpt.config import GPTConfig
from llm_from_scratch.gpt.convert import to_decoder
from llm_from_scratch.gpt.dataset import TextDataset, create_dataloaders
from llm_from_scratch.gpt.model import GPT
from llm_from_scratch.gpt.tokenizer import SimpleTokenizer
from llm_from_scratch.gpt.trainer import GPTTrainer

__all__ = [
    "GPT",
    "GPTConfig",
    "GPTTrainer",
    "SimpleTokenizer",
    "TextDataset",
    "create_dataloaders",
    "load_gpt",
    "to_decoder",
]
