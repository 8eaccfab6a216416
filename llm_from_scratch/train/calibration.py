"""Text for calibration: a few hundred windows of token ids, spread evenly over what is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.read import read_documents
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.text.inputs import put_around
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.assemble import Model

LARGEST_TEXT = 32_000_000  # characters that are looked at
TOKENS_AT_ONCE = 2048  # in a batch


def calibration_windows(
    paths: Sequence[Path | str], tokenizer: Tokenizer, samples: int, seq_len: int
) -> Tensor:
    """Token ids (samples, seq_len) from files as `--data` takes them.

    The windows begin at even distances in the text; fewer come back where there is less text. A
    tokenizer that puts a token in front of every text puts it in front of every window.
    """
    text = _text(paths)
    first = [tokenizer.bos_id] if put_around(tokenizer)[0] and tokenizer.bos_id is not None else []
    wanted = seq_len - len(first)
    # So many characters hold a window, unless tokens are very long here.
    stretch = 12 * wanted
    rows: list[list[int]] = []
    for sample in range(samples):
        start = sample * max(len(text) - stretch, 0) // max(samples - 1, 1)
        ids = tokenizer.encode(text[start : start + stretch])
        if len(ids) >= wanted:
            rows.append([*first, *ids[:wanted]])
        if len(text) <= stretch:  # all of it is one stretch: cut it up instead
            rows = [
                [*first, *ids[at : at + wanted]] for at in range(0, len(ids) - wanted + 1, wanted)
            ][:samples]
            break
    if not rows:
        raise UserError(
            f"The calibration text {', '.join(map(str, paths))} is too short: one window is "
            f"{seq_len} tokens. Give more text, or a smaller --calibrate_length."
        )
    return torch.tensor(rows)


def _text(paths: Sequence[Path | str]) -> str:
    parts: list[str] = []
    size = 0
    try:
        for document in read_documents(paths):
            parts.append(document.text)
            size += len(document.text)
            if size > LARGEST_TEXT:
                break
    except UserError as error:
        raise UserError(str(error).replace("--data", "--calibrate")) from error
    return "\n\n".join(parts)[:LARGEST_TEXT]


def calibration_batches(
    model: Model,
    tokenizer: Tokenizer,
    paths: Sequence[Path | str],
    samples: int,
    seq_len: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """The windows as batches on `device`; windows are no longer than the model's context."""
    if isinstance(model.config, EncoderDecoderConfig):
        raise UserError(
            "An encoder-decoder would be calibrated with pairs of texts, which is not supported; "
            "use a method that needs no calibration (rtn, magnitude)."
        )
    if samples < 1 or seq_len < 2:
        raise UserError(
            f"{samples} windows of {seq_len} tokens are no calibration text; use at least 1 window "
            "and 2 tokens."
        )
    seq_len = min(seq_len, model.config.max_seq_len)
    windows = calibration_windows(paths, tokenizer, samples, seq_len)
    yield from windows.to(device).split(max(1, TOKENS_AT_ONCE // seq_len))
