"""Model folders of every kind with a tokenizer, so small that a run on them takes a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.weights.families import read_config
from llm_from_scratch.weights.folder_write import save_folder
from tests.train.helpers import text

WORDS = "good bad fine poor red green blue film book song one two three four five six seven eight"


def wordpieces() -> Tokenizer:
    """A vocabulary as BERT's."""
    return train_tokenizer([text(400) + WORDS] * 3, kind="wordpiece", vocab_size=300)


def byte_pairs() -> Tokenizer:
    """A vocabulary as GPT-2's, with a token that ends a text."""
    return train_tokenizer([text(400) + WORDS] * 3, kind="bpe", vocab_size=320)


def encoder_folder(folder: Path, seed: int = 0, **changes: Any) -> str:
    tokenizer = wordpieces()
    described = {
        "model_type": "bert", "vocab_size": tokenizer.vocab_size, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 64, "hidden_dropout_prob": 0.1, **changes,
    }  # fmt: skip
    _, config = read_config(described, "config.json")
    assert isinstance(config, ModelConfig)
    model = Encoder(config)
    model.initialise(seed)
    save_folder(model, tokenizer, folder)
    return str(folder)


def decoder_folder(folder: Path, seed: int = 0) -> str:
    tokenizer = byte_pairs()
    settings = ModelSettings(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2)
    model = Decoder(resolve(settings, tokenizer.vocab_size, 64))
    model.initialise(seed)
    save_folder(model, tokenizer, folder)
    return str(folder)


def encoder_decoder_folder(folder: Path, seed: int = 0) -> str:
    tokenizer = wordpieces()
    described = {
        "model_type": "bart", "vocab_size": tokenizer.vocab_size, "d_model": 32,
        "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 64, "decoder_start_token_id": 2, "dropout": 0.0,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "init_std": 0.1,
    }  # fmt: skip
    _, config = read_config(described, "config.json")
    assert isinstance(config, EncoderDecoderConfig)
    config = replace(config, encoder=replace(config.encoder), decoder=replace(config.decoder))
    model = EncoderDecoder(config)
    model.initialise(seed)
    save_folder(model, tokenizer, folder)
    return str(folder)


FOLDERS = {
    "encoder": encoder_folder, "decoder": decoder_folder, "encoder-decoder": encoder_decoder_folder
}  # fmt: skip
