"""`scratchlm prune`: a model with the weights set to zero that matter least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llm_from_scratch.core.device import pick_device
from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.model.adapters import merged
from llm_from_scratch.quant.calibrate import walk
from llm_from_scratch.quant.prune import PATTERNS, keep_mask
from llm_from_scratch.train.calibration import calibration_batches
from llm_from_scratch.train.quantize import DEFAULT_LENGTH, DEFAULT_SAMPLES
from llm_from_scratch.weights.catalogue import Report, to_stderr
from llm_from_scratch.weights.convert import check_out, save_with_sides
from llm_from_scratch.weights.quantized_write import matrices
from llm_from_scratch.weights.sources import STORED, as_dtype, load, locate

METHODS = ("magnitude", "wanda")


@dataclass(frozen=True)
class Pruned:
    """What came out: `sparsity` is the share of zeros in the matrices of the blocks."""

    path: str
    method: str
    pattern: str
    sparsity: float
    matrices: int
    parameters: int
    bytes: int


@torch.no_grad()
def prune(
    model: str | Path,
    out: str | Path,
    *,
    sparsity: float = 0.5,
    method: str = "magnitude",
    pattern: str = "unstructured",
    calibrate: Sequence[str | Path] = (),
    dtype: str | None = None,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    device: str = "auto",
    report: Report = to_stderr,
) -> Pruned:
    """Write `model` as a folder in which a share of each matrix of the blocks is zero.

    Args:
        model: anything that `load` takes.
        out: the folder. An earlier model there is replaced; nothing else is.
        sparsity: the share of zeros, above 0 and below 1; the pattern "2:4" is always 0.5.
        method: "magnitude" takes the smallest weights; "wanda" (arXiv:2306.11695) those whose
            product with the usual size of their input on the calibration text is smallest.
        pattern: "unstructured", or "2:4": two zeros in every four inputs in a row.
        calibrate: files as `--data` takes them, for wanda.
        dtype: of the weights, "bf16", "fp16" or "fp32". None: the stored precision.
        samples, length: at most so many windows of so many tokens are taken from the text.
        device: where the model runs while it is calibrated.

    Raises `UserError` for settings that do not fit together.
    """
    _check(sparsity, method, pattern, calibrate)
    numbers = as_dtype(dtype)
    out, source = Path(out), locate(model)
    check_out(out, source, "hf")
    report(f"Reading {model} ...")
    loaded, tokenizer = load(source, dtype=STORED, device="cpu")
    loaded = merged(loaded)
    numbers = numbers or next(loaded.parameters()).dtype
    names = set(matrices(loaded))
    if pattern == "2:4":
        odd = [name for name in names if loaded.get_parameter(name).shape[1] % 4]
        if odd:
            raise UserError(
                f"'{min(odd)}' has inputs that are no multiple of 4; use the pattern unstructured."
            )
    loaded.float()

    def cut(weight: Tensor, squares: Tensor | None) -> None:
        mask = keep_mask(weight, sparsity, pattern=pattern, input_squares_i=squares)
        weight.mul_(mask)

    def treat(_: str, layer: nn.Module, squares: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        cut(layer.weight, squares)

    if method == "wanda":
        where = pick_device(device)
        batches = list(calibration_batches(loaded, tokenizer, calibrate, samples, length, where))
        walk(
            loaded.to(where), batches, lambda place: f"{place}.weight" in names, treat,
            full=False, report=lambda line: report(f"Wanda, {line}"),
        )  # fmt: skip
        loaded.to("cpu")
    else:
        for name in names:
            cut(loaded.get_parameter(name), None)
    zeros = sum(int((loaded.get_parameter(name) == 0).sum()) for name in names)
    total = sum(loaded.get_parameter(name).numel() for name in names)
    report(f"Writing {out} ...")
    save_with_sides(loaded.to(numbers), tokenizer, source, out)
    return Pruned(
        path=str(out),
        method=method,
        pattern=pattern,
        sparsity=zeros / total,
        matrices=len(names),
        parameters=sum(p.numel() for p in loaded.parameters()),
        bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    )


def _check(sparsity: float, method: str, pattern: str, calibrate: Sequence[str | Path]) -> None:
    if method not in METHODS:
        near = nearest(method, METHODS)
        raise UserError(f"There is no method '{method}'; use magnitude or wanda.{near}")
    if pattern not in PATTERNS:
        near = nearest(pattern, PATTERNS)
        raise UserError(f"There is no pattern '{pattern}'; use unstructured or 2:4.{near}")
    if not 0 < sparsity < 1:
        raise UserError(f"--sparsity is {sparsity}; it must be above 0 and below 1.")
    if pattern == "2:4" and sparsity != 0.5:
        raise UserError("The pattern 2:4 makes exactly half of the weights zero; leave --sparsity.")
    if method == "wanda" and not calibrate:
        raise UserError("Wanda needs text to calibrate on; name files with --calibrate.")
    if method == "magnitude" and calibrate:
        raise UserError("--method magnitude looks at no text; leave --calibrate out, or use wanda.")
