"""A model out of a GGUF file: metadata and tensors as our `Decoder` or `Encoder`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.freed import give_back
from llm_from_scratch.model.config import ModelConfig, RopeScaling
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.heads import Embedder, HeadConfig, HeadStyle
from llm_from_scratch.model.positions import rope_frequencies
from llm_from_scratch.quant.packed import PackedWeight
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.assemble import (
    Model,
    complete,
    empty_model,
    put,
    sparing,
    undisturbed,
)
from llm_from_scratch.weights.config_json import LARGEST, check_sizes
from llm_from_scratch.weights.families.table import Entry
from llm_from_scratch.weights.folder_checks import check_vocabulary
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_architectures import Architecture, architecture_named
from llm_from_scratch.weights.gguf_settings import POOLING_TYPES, Keys
from llm_from_scratch.weights.gguf_tokenizer import read_tokenizer
from llm_from_scratch.weights.layouts import stored_shape, take_apart
from llm_from_scratch.weights.packing import can_keep_blocks, pack_the_rest, put_packed

ROPE_FACTORS = "rope_freqs.weight"


def read_config(file: GGUF) -> tuple[Architecture, ModelConfig]:
    """The architecture and config of a file; `UserError` names the key that does not fit."""
    table = architecture_named(file.metadata.get("general.architecture"), file.path)
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} lacks the tensor 'token_embd.weight'; download it anew.")
    prefix = f"{table.name}."
    values = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    values |= facts(file)
    config = table.read(Keys(values, table.name, str(file.path)))
    if ROPE_FACTORS in file.tensors:
        values[".rope_freqs"] = rope_scaling(file, config)
        config = table.read(Keys(values, table.name, str(file.path)))
    check_sizes(config, str(file.path))
    return table, config


def facts(file: GGUF) -> dict[str, Any]:
    """What the tensors say of a model, where GGUF has no key for it: see `gguf_settings.py`."""

    def rows(name: str) -> int:
        return file.tensors[name].shape[0] if name in file.tensors else 0

    flags = ("attn_q.bias", "attn_output.bias", "ffn_up.bias")
    return {
        ".token_embd": rows("token_embd.weight"),
        ".token_types": rows("token_types.weight"),
        ".output": "output.weight" in file.tensors,
        **{f".{name}": f"blk.0.{name}" in file.tensors for name in flags},
    }


def rope_divisors(config: ModelConfig) -> Tensor:
    """What each pair's rotary frequency is divided by: how GGUF stores Llama 3's stretching."""
    plain = rope_frequencies(config.rope_dim, config.rope_theta, None)
    return plain / rope_frequencies(config.rope_dim, config.rope_theta, config.rope_scaling)


def rope_scaling(file: GGUF, config: ModelConfig) -> RopeScaling | None:
    """The settings behind the stored divisors, which must be Llama 3's; None if nothing is divided.

    They are not stored. Published ones differ in the factor and the original length only; others
    follow from the divisors where a head is wide enough.
    """
    stored = file.read(ROPE_FACTORS)
    plain = rope_frequencies(config.rope_dim, config.rope_theta, None)
    factor = float(f"{float(stored.max()):.5g}")
    if stored.shape == plain.shape and 1 <= factor < math.inf:
        if torch.equal(stored, torch.ones_like(stored)):
            return None
        lengths = (8192, *(1 << power for power in range(5, 21)))
        candidates = [RopeScaling("llama3", factor, 1.0, 4.0, length) for length in lengths]
        for scaling in (*_fitted(stored, plain, factor), *candidates):
            stretched = rope_frequencies(config.rope_dim, config.rope_theta, scaling)
            if torch.allclose(plain / stored, stretched, rtol=1e-4):
                return scaling
    raise UserError(
        f"{file.path}: the tensor '{ROPE_FACTORS}' stretches the rotary frequencies in a way "
        "other than Llama 3's, which is not supported. Take the model as a folder instead."
    )


def _fitted(stored: Tensor, plain: Tensor, factor: float) -> list[RopeScaling]:
    """Settings by the line on which the shares of the frequencies lie that are kept.

    Between the pairs that are kept and those that are divided by the whole factor, the share grows
    in proportion to the frequency: two such pairs give the line, and the line the settings (but for
    what `low_freq_factor` and the original length have in common: the first is taken as 1).
    """
    kept = ((1 / stored - 1 / factor) / (1 - 1 / factor)).double()
    between = (kept > 0.001) & (kept < 0.999)
    kept, turns = kept[between], plain[between].double() / (2 * math.pi)
    if len(kept) < 2:
        return []
    slope = float((kept.max() - kept.min()) / (turns.max() - turns.min()))
    below = slope * float(turns.max()) - float(kept.max())  # zero, at no turns at all
    if not 0 < below < math.inf or not slope / below < LARGEST:  # or not a number: no line
        return []
    high = float(f"{1 + 1 / below:.4g}")
    return [RopeScaling("llama3", factor, 1.0, high, max(round(slope / below), 1))]


def to_halves(tensor: Tensor, head_dim: int) -> Tensor:
    """Undo llama.cpp's order of the rows of Q and K.

    It turns neighbouring features (2 j, 2 j + 1) of a head, we turn (j, j + d/2), as the Hugging
    Face folders do; its converter interleaved the rows, and this sorts them back.
    """
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _check(file: GGUF, model: Model, entries: Sequence[Entry], name: str) -> None:
    wanted = {entry.theirs for entry in entries}
    missing = sorted(wanted - file.tensors.keys())
    if missing:
        raise UserError(
            f"{file.path} lacks {len(missing)} tensor(s) that its metadata asks for, such as "
            f"'{missing[0]}'; download it anew."
        )
    surplus = sorted(file.tensors.keys() - wanted - {ROPE_FACTORS})
    if surplus:
        raise UserError(
            f"{file.path} holds {len(surplus)} tensor(s) that a model of the architecture '{name}' "
            f"does not have, such as '{surplus[0]}'; it cannot be read."
        )
    for entry in entries:
        shape = stored_shape(entry, [model.get_parameter(part).shape for part in entry.ours])
        found = file.tensors[entry.theirs].shape
        if found != shape:
            raise UserError(
                f"{file.path}: the tensor '{entry.theirs}' has the shape {found}, but the metadata "
                f"means {shape}."
            )


def _read(file: GGUF, entry: Entry, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    if entry.theirs.endswith("norm.weight") and config.norm == "rms_plus_one":
        return (file.read(entry.theirs) - 1.0).to(dtype)
    stored = file.read(entry.theirs, dtype)
    return to_halves(stored, config.head_dim) if entry.layout == "turned" else stored


def embedding_head(file: GGUF, table: Architecture) -> HeadConfig | None:
    """The head of a model for embeddings; None where the metadata names no way to make them."""
    number = file.metadata.get(f"{table.name}.pooling_type")
    if not isinstance(number, int) or number not in POOLING_TYPES:
        return None
    return HeadConfig("embedding", HeadStyle(pooling=POOLING_TYPES[number]), normalise=True)


def _keep(file: GGUF, model: Model, entry: Entry, config: ModelConfig) -> bool:
    """Let a matrix be packed layers of the model, bit for bit; False where it cannot be."""
    form, shape = file.tensors[entry.theirs].form, file.tensors[entry.theirs].shape
    if not can_keep_blocks(model, entry, form, shape):
        return False
    rows = file.raw(entry.theirs).view(shape[0], -1)
    if entry.layout == "turned":
        rows = to_halves(rows, config.head_dim)
    shapes = [model.get_parameter(name).shape for name in entry.ours]
    parts = list(take_apart(rows, entry, shapes, config.n_heads))
    for name, part in zip(entry.ours, parts, strict=True):
        raw = part.contiguous().view(-1)
        put_packed(model, name, PackedWeight.from_blocks(raw, form, len(part), shape[-1]))
    return True


@undisturbed()
@torch.no_grad()
def load_gguf(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    head: str | None = None,
    packed: bool = False,
) -> tuple[Model, Tokenizer | None]:
    """The model (in inference mode, weights decoded to `dtype`) and tokenizer of a GGUF file.

    With `packed` (on the CPU), what the kernels can compute with stays as it is stored.

    A model for embeddings comes under the head that makes them, if `head` is None or "embedding":
    of length 1, as llama.cpp gives them. The tokenizer is None where the file has none. Raises
    `UserError` naming the key or tensor for anything that cannot be read.
    """
    file = GGUF(path)
    table, config = read_config(file)
    tokenizer = read_tokenizer(file)
    check_vocabulary(config.vocab_size, tokenizer, file.path)
    for key in [key for key in file.metadata if key.startswith("tokenizer.")]:
        del file.metadata[key]  # hundreds of thousands of words, of no more use
    give_back()
    model = empty_model(config)
    entries = list(table.entries(config, dict(model.named_parameters())))
    _check(file, model, entries, table.name)
    for entry in sparing(model, entries):
        shapes = [model.get_parameter(name).shape for name in entry.ours]
        if packed and _keep(file, model, entry, config):
            continue
        stored = _read(file, entry, config, dtype)
        parts = take_apart(stored, entry, shapes, config.n_heads)
        for name, part in zip(entry.ours, parts, strict=True):
            # Of a fused tensor each part becomes a tensor of its own.
            put(model, name, (part.clone() if len(shapes) > 1 else part).to(device))
    made = embedding_head(file, table)
    if made is not None and head in (None, "embedding"):
        assert isinstance(model, Decoder | Encoder)
        model = Embedder(model, made)
    complete(model, device)
    if packed:
        pack_the_rest(model)
    return model, tokenizer
