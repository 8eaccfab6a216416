"""A model into a GGUF file, for llama.cpp and everything that is built on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.model.adapters import merged
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.heads import Embedder, Head, HeadConfig
from llm_from_scratch.model.inventory import AnyConfig
from llm_from_scratch.quant.formats import BF16, F16, F32, Q4_0, Q8_0, Format
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.assemble import Model
from llm_from_scratch.weights.families.table import Entry
from llm_from_scratch.weights.folder_checks import check_vocabulary
from llm_from_scratch.weights.gguf_architectures import Architecture, architecture_of
from llm_from_scratch.weights.gguf_load import ROPE_FACTORS, rope_divisors
from llm_from_scratch.weights.gguf_settings import POOLING_TYPES
from llm_from_scratch.weights.gguf_tokenizer_write import tokenizer_metadata
from llm_from_scratch.weights.gguf_write import Planned, write_gguf
from llm_from_scratch.weights.layouts import put_together, stored_shape
from llm_from_scratch.weights.packing import unpacked

KINDS = {form.name: form for form in (F32, F16, BF16, Q8_0, Q4_0)}
# `general.file_type`: the numbers of enum llama_ftype.
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
# Small or sensitive: llama.cpp's converter keeps these in fp32 whatever the rest is.
ALWAYS_F32 = ("position_embd.weight", "token_types.weight", "ffn_gate_inp.weight", "norm.weight")
# Where an error in one number is an error of a whole token.
VOCABULARY = ("token_embd.weight", "output.weight")


def save_gguf(
    model: Model,
    tokenizer: Tokenizer | None,
    path: Path | str,
    kind: str = "F16",
    *,
    name: str | None = None,
) -> None:
    """Write a GGUF file that llama.cpp loads; it appears under `path` whole or not at all.

    Args:
        model: a decoder, or an encoder such as BERT (of which the pooler is left out); with the
            head that makes embeddings, or without a head. Adapters are merged.
        tokenizer: its vocabulary and chat template go into the file. None: the file has none.
        kind: the format of the matrices: F32, F16, BF16, Q8_0 or Q4_0. Vectors, and what is as
            small and sensitive, stay in F32; with Q4_0 the embedding and the head are Q8_0; rows
            that are no multiple of 32 values are F16.
        name: what the model calls itself (`general.name`); None: the file's name.

    Raises `UserError` where llama.cpp has no architecture or no vocabulary that works like these,
    before anything is written.
    """
    if kind not in KINDS:
        raise UserError(
            f"There is no kind '{kind}'; use one of {', '.join(KINDS)}.{nearest(kind, KINDS)}"
        )
    model, pooling = _without_head(unpacked(merged(model)))
    path, config = Path(path), model.config
    check_vocabulary(config.vocab_size, tokenizer, path)
    table, values = architecture_of(config)
    values |= pooling
    metadata: dict[str, Any] = {
        "general.architecture": table.name,
        "general.name": path.stem if name is None else name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        f"{table.name}.vocab_size": config.vocab_size,
    }
    for key, value in values.items():
        if not key.startswith(".") and value is not None:
            metadata[f"{table.name}.{key}"] = value
    metadata |= tokenizer_metadata(tokenizer, config.vocab_size)
    if isinstance(model, Encoder):
        metadata["tokenizer.ggml.token_type_count"] = max(config.n_segments, 1)
    write_gguf(path, metadata, list(_plan(model, table, KINDS[kind])))


def _without_head(model: Model) -> tuple[Decoder | Encoder, dict[str, int]]:
    """The backbone, and the key that says how embeddings are made of its states."""
    pooling: dict[str, int] = {}
    if isinstance(model, Embedder):
        numbers = {ours: number for number, ours in POOLING_TYPES.items()}
        if model.head_config.style.pooling in numbers:
            pooling["pooling_type"] = numbers[model.head_config.style.pooling]
            model = model.backbone
    if isinstance(model, Decoder | Encoder):
        return model, pooling
    raise _not_in_a_gguf("a head" if isinstance(model, Head) else "an encoder-decoder")


def check_description(config: AnyConfig, head: HeadConfig | None) -> None:
    """Raise `UserError` for a model that no GGUF file can hold, before its weights are there."""
    if not isinstance(config, ModelConfig):
        raise _not_in_a_gguf("an encoder-decoder")
    poolings = POOLING_TYPES.values()
    if head is not None and (head.kind != "embedding" or head.style.pooling not in poolings):
        raise _not_in_a_gguf("a head")
    architecture_of(config)


def _not_in_a_gguf(what: str) -> UserError:
    return UserError(
        "A GGUF file holds a decoder or an encoder, plain or for embeddings (mean, first or last "
        f"state), but not {what} like this one; save it as a Hugging Face folder instead."
    )


def _plan(model: Decoder | Encoder, table: Architecture, form: Format) -> Iterator[Planned]:
    parameters = dict(model.named_parameters())
    config = model.config
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        divisors = rope_divisors(config)
        yield Planned(ROPE_FACTORS, tuple(divisors.shape), F32, lambda: divisors)
    entries = list(table.entries(config, parameters))
    if table.stored_head and config.tie_embeddings:
        entries.append(Entry("output.weight", ("embedding.weight",)))
    for entry in entries:
        shape = list(stored_shape(entry, [parameters[name].shape for name in entry.ours]))
        if entry.ours == ("positions.weight",):
            shape[0] -= config.position_offset
        yield Planned(
            entry.theirs,
            tuple(shape),
            _format(entry.theirs, tuple(shape), form),
            lambda entry=entry: _value(entry, parameters, config),  # type: ignore[misc]
        )


def _format(name: str, shape: tuple[int, ...], form: Format) -> Format:
    if len(shape) < 2 or name.endswith(ALWAYS_F32):
        return F32
    if form is Q4_0 and name in VOCABULARY:
        form = Q8_0
    return form if shape[-1] % form.values == 0 else F16


def _value(entry: Entry, parameters: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """One tensor as llama.cpp wants it: see the conventions in `gguf_architectures.py`."""
    with torch.no_grad():
        stored = put_together(entry, [parameters[name] for name in entry.ours], config.n_heads)
        if entry.layout == "turned":
            # (heads, 2 halves, pairs) -> (heads, pairs, 2): neighbours are turned together
            split = stored.unflatten(0, (-1, 2, config.head_dim // 2))
            stored = split.transpose(1, 2).flatten(0, 2)
        if entry.theirs.endswith("norm.weight") and config.norm == "rms_plus_one":
            stored = stored.float() + 1.0
        if entry.ours == ("positions.weight",):
            stored = stored[config.position_offset :]
        return stored
