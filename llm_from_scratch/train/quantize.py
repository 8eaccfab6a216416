"""`scratchlm quantize`: a model with its matrices in few bits, without training it again.

The methods are in `quant/`; here they meet a model: which matrices, in which order, on which text,
and how the result is written.
"""

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
from llm_from_scratch.quant.gptq import quantize_gptq
from llm_from_scratch.quant.nf4 import BLOCK, quantize_nf4
from llm_from_scratch.quant.rtn import GROUP_SIZES, fitting_group, quantize_rtn
from llm_from_scratch.train.calibration import calibration_batches
from llm_from_scratch.weights.assemble import Model
from llm_from_scratch.weights.catalogue import Report, to_stderr
from llm_from_scratch.weights.convert import check_out, save_with_sides
from llm_from_scratch.weights.quantized_write import Codes, matrices, refuse_conv1d
from llm_from_scratch.weights.sources import STORED, as_dtype, load, locate

TARGETS = ("int8", "int4", "nf4")
METHODS = ("rtn", "gptq")
WHOLE_ROW = 0  # a group size: each output has one scale
DEFAULT_GROUP = {"int8": WHOLE_ROW, "int4": 32, "nf4": BLOCK}
DEFAULT_SAMPLES, DEFAULT_LENGTH = 128, 512


@dataclass(frozen=True)
class Quantized:
    """What came out. `bits_per_weight` is that of the `matrices` that were quantised, scales
    included; `dense` names those that could not be; `bytes` are those of all files."""

    path: str
    to: str
    method: str
    group_size: int
    bits_per_weight: float
    parameters: int
    quantized: int
    matrices: int
    dense: list[str]
    bytes: int


def quantize(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    method: str = "rtn",
    calibrate: Sequence[str | Path] = (),
    group_size: int | None = None,
    zero_points: bool = False,
    dtype: str | None = None,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    device: str = "auto",
    report: Report = to_stderr,
) -> Quantized:
    """Write `model` as a folder whose matrices are in few bits, for `load` and `transformers`.

    Args:
        model: anything that `load` takes.
        to: "int8" or "int4" (compressed-tensors, pack-quantized), or "nf4" (bitsandbytes).
        out: the folder. An earlier model there is replaced; nothing else is.
        method: "rtn" rounds to the nearest; "gptq" (integers only) fits the rounding to what the
            matrices meet on the calibration text.
        calibrate: files as `--data` takes them. Use text like that which the model is for, and
            never the text that it is measured on.
        group_size: inputs that share a scale: 32, 64, 128, or 0 for the whole row. None: 32 for
            int4, the whole row for int8. Where it does not divide a row, the next smaller does.
        zero_points: whether the groups of integers have one each.
        dtype: of what stays as numbers, and of the scales: "bf16", "fp16" or "fp32". None: the
            stored precision, but bf16 in the place of fp32.
        samples, length: at most so many windows of so many tokens are taken from the text.
        device: where the model runs while it is calibrated.

    Raises `UserError` for settings that do not fit together, and for a family whose class cannot
    hold the format.
    """
    _check(to, method, calibrate, group_size, zero_points)
    numbers = as_dtype(dtype)
    out, source = Path(out), locate(model)
    check_out(out, source, "hf")
    report(f"Reading {model} ...")
    loaded, tokenizer = load(source, dtype=STORED, device="cpu")
    loaded = merged(loaded)
    stored = next(loaded.parameters()).dtype
    numbers = numbers or (torch.bfloat16 if stored == torch.float32 else stored)
    if to != "nf4":
        refuse_conv1d(loaded)
    group = DEFAULT_GROUP[to] if group_size is None else group_size
    plan = _Plan(loaded, to, group, zero_points, numbers)
    if not plan.sizes:
        least = BLOCK if to == "nf4" else min(GROUP_SIZES)
        raise UserError(
            f"{model} has no matrix that can be quantised: the inputs of none are a multiple of "
            f"{least}."
        )
    loaded.float()
    if method == "gptq":
        where = pick_device(device)
        batches = list(calibration_batches(loaded, tokenizer, calibrate, samples, length, where))
        report(f"Calibrating on {sum(b.numel() for b in batches):,} tokens ...")
        codes = _calibrated(loaded.to(where), batches, plan, report)
        loaded.to("cpu")
    else:
        report(f"Rounding {len(plan.sizes)} matrices ...")
        codes = {name: plan.codes(name, loaded.get_parameter(name)) for name in plan.sizes}
    report(f"Writing {out} ...")
    save_with_sides(loaded.to(numbers), tokenizer, source, out, codes)
    return _told(loaded, codes, plan, out, method)


class _Plan:
    """What happens to each matrix. `sizes` has the groups of those that are quantised, in order;
    `dense` names the others."""

    def __init__(
        self, model: Model, to: str, group: int, zero_points: bool, dtype: torch.dtype
    ) -> None:
        self.to, self.group, self.zero_points, self.dtype = to, group, zero_points, dtype
        self.sizes: dict[str, int] = {}
        self.dense: list[str] = []
        for name in matrices(model):
            size = self._fitting(model.get_parameter(name).shape[1])
            if size is None:
                self.dense.append(name)
            else:
                self.sizes[name] = size
        if zero_points and group != WHOLE_ROW and self.sizes:
            # transformers reads zero points in groups of one size only.
            self.sizes = dict.fromkeys(self.sizes, min(self.sizes.values()))

    def _fitting(self, inputs: int) -> int | None:
        if self.to == "nf4":
            return BLOCK if inputs % BLOCK == 0 else None
        return fitting_group(inputs, None if self.group == WHOLE_ROW else self.group)

    def codes(self, name: str, weight: Tensor, hessian: Tensor | None = None) -> Codes:
        """One matrix in few bits: rounded, or with a Hessian by GPTQ."""
        if not torch.isfinite(weight).all():  # no code stands for such a value
            raise UserError(
                f"'{name}' holds values that are not finite, so the model is broken; copy it anew, "
                "or take an earlier checkpoint."
            )
        if self.to == "nf4":
            return quantize_nf4(weight)
        bits, size, symmetric = int(self.to[3:]), self.sizes[name], not self.zero_points
        if hessian is None:
            return quantize_rtn(weight, bits, size, symmetric=symmetric, scale_dtype=self.dtype)
        return quantize_gptq(
            weight, hessian, bits, size, symmetric=symmetric, scale_dtype=self.dtype
        )


def _check(
    to: str,
    method: str,
    calibrate: Sequence[str | Path],
    group_size: int | None,
    zero_points: bool,
) -> None:
    if to not in TARGETS:
        raise UserError(f"There is no format '{to}'; use int8, int4 or nf4.{nearest(to, TARGETS)}")
    if method not in METHODS:
        raise UserError(
            f"There is no method '{method}'; use rtn or gptq.{nearest(method, METHODS)}"
        )
    if method == "gptq" and to == "nf4":
        raise UserError("GPTQ makes integers; use --to int4 or int8, or --method rtn for NF4.")
    if method == "gptq" and not calibrate:
        raise UserError("GPTQ needs text to calibrate on; name files with --calibrate.")
    if method == "rtn" and calibrate:
        raise UserError("--method rtn looks at no text; leave --calibrate out, or use gptq.")
    if to == "nf4" and zero_points:
        raise UserError("NF4 has no zero points; leave --zero_points out.")
    allowed = (BLOCK,) if to == "nf4" else (WHOLE_ROW, *GROUP_SIZES)
    if group_size is not None and group_size not in allowed:
        raise UserError(
            f"--group_size is {group_size}; for {to} it must be "
            + " or ".join(map(str, allowed))
            + (" (0: the whole row)." if len(allowed) > 1 else ".")
        )


def _calibrated(
    model: Model, batches: Sequence[Tensor], plan: _Plan, report: Report
) -> dict[str, Codes]:
    """Block by block, so that each is fitted to what the quantised blocks before it give."""
    codes: dict[str, Codes] = {}

    def treat(place: str, layer: nn.Module, hessian: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        found = plan.codes(f"{place}.weight", layer.weight, hessian)
        layer.weight.copy_(found.dequantize())
        codes[f"{place}.weight"] = found

    def wanted(place: str) -> bool:
        return f"{place}.weight" in plan.sizes

    walk(model, batches, wanted, treat, full=True, report=lambda line: report(f"GPTQ, {line}"))
    return codes


def _told(model: Model, codes: dict[str, Codes], plan: _Plan, out: Path, method: str) -> Quantized:
    weights = {name: part.shape.numel() for name, part in codes.items()}
    bits = sum(part.bits_per_weight * weights[name] for name, part in codes.items())
    return Quantized(
        path=str(out),
        to=plan.to,
        method=method,
        group_size=plan.group,
        bits_per_weight=bits / sum(weights.values()),
        parameters=sum(p.numel() for p in model.parameters()),
        quantized=sum(weights.values()),
        matrices=len(codes),
        dense=plan.dense,
        bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    )
