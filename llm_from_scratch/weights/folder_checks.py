"""What reading and writing a model folder have in common."""

from __future__ import annotations

from pathlib import Path

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.families import AnyConfig


def is_model_folder(path: Path) -> bool:
    """Whether `path` looks like a Hugging Face model folder, complete or not."""
    return (path / "config.json").is_file()


def heads_of(config: AnyConfig) -> int:
    stack = config.decoder if isinstance(config, EncoderDecoderConfig) else config
    return stack.n_heads


def check_vocabularies(config: AnyConfig, tokenizer: Tokenizer | None, where: Path) -> None:
    """The same for each stack: encoder and decoder may have a vocabulary of their own."""
    if isinstance(config, EncoderDecoderConfig) and tokenizer is not None:
        check_vocabulary(config.encoder.vocab_size, tokenizer, where)
        tokenizer = tokenizer.target
    check_vocabulary(config.vocab_size, tokenizer, where)


def check_vocabulary(vocab_size: int, tokenizer: Tokenizer | None, where: Path | str) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for."""
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} entries, but the model only "
            f"{vocab_size}; they do not belong together."
        )
