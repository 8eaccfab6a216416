"""Every architecture there is: all families and their variants, sizes of a normal look, heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.inventory import AnyConfig
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.weights.families import FAMILIES, read_config
from tests.model.references import REFERENCES, VARIANTS
from tests.model.references_encoders import ENCODERS
from tests.model.references_encoders import VARIANTS as ENCODER_VARIANTS
from tests.model.references_seq2seq import SEQ2SEQ, SEQ2SEQ_VARIANTS

LONGEST = 640


def _read(name: str, values: dict[str, Any]) -> AnyConfig:
    return _longer(read_config(getattr(transformers, name)(**values).to_dict(), name)[1])


def _longer(config: AnyConfig) -> AnyConfig:
    """With room for more than the lengths at which `attend` changes its way."""
    if isinstance(config, EncoderDecoderConfig):
        stacks = (replace(stack, max_seq_len=LONGEST) for stack in (config.encoder, config.decoder))
        return replace(config, **dict(zip(("encoder", "decoder"), stacks, strict=True)))
    return replace(config, max_seq_len=LONGEST)


def _families() -> Iterator[tuple[str, AnyConfig]]:
    for name, (config, _, values) in REFERENCES.items():
        yield name, _read(config, values)
    for name, (config, values) in ENCODERS.items():
        yield name, _read(f"{config}Config", values)
    for name, (config, _, values) in SEQ2SEQ.items():
        yield name, _read(config, values)
    bert = _read("BertConfig", ENCODERS["bert"][1])
    assert isinstance(bert, ModelConfig)
    yield "bert-pooler", replace(bert, pooler=True)
    for family in ("llama", "gpt2"):  # of a normal look: no part is negligible
        settings = ModelSettings(family=family, depth=3, n_kv_heads=3, dropout=0.1)
        yield f"{family}-d192", resolve(settings, 5000, LONGEST)


def _variants() -> Iterator[tuple[str, AnyConfig]]:
    tables = {**REFERENCES, **SEQ2SEQ}
    for number, (name, changes) in enumerate([*VARIANTS, *SEQ2SEQ_VARIANTS]):
        config, _, values = tables[name]
        yield f"{name}-{number}", _read(config, {**values, **changes})
    for number, (name, changes) in enumerate(ENCODER_VARIANTS):
        config, values = ENCODERS[name]
        yield f"{name}-{number}", _read(f"{config}Config", {**values, **changes})


ARCHITECTURES = dict(_families())
EVERY = {**ARCHITECTURES, **dict(_variants())}
assert set(FAMILIES) <= set(ARCHITECTURES)


def without_dropout(config: AnyConfig) -> AnyConfig:
    if isinstance(config, EncoderDecoderConfig):
        encoder, decoder = (replace(x, dropout=0.0) for x in (config.encoder, config.decoder))
        return replace(config, encoder=encoder, decoder=decoder)
    return replace(config, dropout=0.0)


def make(config: AnyConfig, compute: torch.dtype = torch.float32) -> nn.Module:
    """A model with fresh weights, in training mode, that computes in `compute`."""
    if isinstance(config, EncoderDecoderConfig):
        model: Any = EncoderDecoder(config)
    else:
        model = Decoder(config) if config.causal else Encoder(config)
    model.initialise(1)
    if compute != torch.float32:
        model.compute_dtype = compute
    return model.train()


def ids(config: AnyConfig, *shape: int) -> torch.Tensor:
    """Random ids of the smaller vocabulary."""
    sizes = [config] if isinstance(config, ModelConfig) else [config.encoder, config.decoder]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, min(s.vocab_size for s in sizes), shape, generator=generator)
