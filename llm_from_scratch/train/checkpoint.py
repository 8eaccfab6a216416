"""Checkpoints: everything that the next step depends on, and no pickle.

    checkpoints/step-120/model.safetensors       weights that are trained (tied ones once)
    checkpoints/step-120/optimizer.safetensors   "0.17.exp_avg": optimiser, parameter, state
    checkpoints/step-120/rng.safetensors         generator states of each process
    checkpoints/step-120/source.safetensors      what the data source keeps, if anything
    checkpoints/step-120/state.json              counters

A checkpoint is written aside, flushed and renamed, and an old one is renamed before it is deleted:
whatever moment the process dies at, every `step-N` folder is complete.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.core.files import ASIDE, folder_aside, remove_asides
from llm_from_scratch.core.runlog import read_json, write_json

STEP = re.compile(r"step-(\d+)$")


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that is trained, under its first name: tied weights once.

    What is frozen is as it was loaded, and need not be stored.
    """
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every state tensor, named optimiser.parameter.state."""
    tensors: dict[str, Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"{number}.{parameter}.{name}"] = torch.as_tensor(value)
    return tensors


def restore_optimizers(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, value in tensors.items():
        number, parameter, name = key.split(".", 2)
        states[int(number)].setdefault(int(parameter), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := STEP.fullmatch(p.name))]
    return sorted(found)


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    rng: list[dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    source: dict[str, Tensor],
) -> Path:
    """Write checkpoints/step-N and delete all but the newest `keep`."""
    target = folder / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    remove_asides(folder)
    with folder_aside(target) as aside:
        try:
            weights = {k: v.contiguous().cpu() for k, v in own_parameters(model).items()}
            save_file(weights, aside / "model.safetensors")
            moments = {k: v.contiguous().cpu() for k, v in optimizer_tensors(optimizers).items()}
            save_file(moments, aside / "optimizer.safetensors")
            named = {f"{r}.{k}": v for r, states in enumerate(rng) for k, v in states.items()}
            save_file(named, aside / "rng.safetensors")
            if source:
                kept = {k: v.contiguous().cpu() for k, v in source.items()}
                save_file(kept, aside / "source.safetensors")
        except Exception as error:
            # safetensors wraps the operating system's words in its own exception type.
            raise _explain(error, target) from error
        write_json(aside / "state.json", {**state, "step": step})
    for _, old in step_folders(folder)[:-keep] if keep > 0 else []:
        doomed = old.with_name(f"{ASIDE}{old.name}")
        old.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return target


def _explain(error: Exception, target: Path) -> Exception:
    if "No space left" in str(error) or "os error 28" in str(error):
        return RunError(
            f"The disk is full: {target} could not be written. Free some space and go on with "
            "--resume; the checkpoint before this one is still there."
        )
    return error if isinstance(error, OSError) else RunError(f"{target}: {error}.")


def load_checkpoint(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, Any], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Put a checkpoint's weights and moments in place.

    Returns its counters, the generators' states of each process, and what the source kept.
    """
    try:
        state = read_json(path / "state.json")
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        rng_flat = load_file(path / "rng.safetensors")
        kept = path / "source.safetensors"
        source = load_file(kept) if kept.is_file() else {}
    except Exception as error:
        raise UserError(
            f"The checkpoint {path} is damaged ({error}); remove its folder and resume."
        ) from error
    own = own_parameters(model)
    for name, parameter in own.items():
        if name not in weights or weights[name].shape != parameter.shape:
            raise UserError(f"The checkpoint {path} does not fit the model: tensor {name}.")
        parameter.copy_(weights[name])
    try:
        restore_optimizers(optimizers, moments)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"The checkpoint {path} does not fit the optimiser ({error}). Delete that folder and "
            "resume."
        ) from error
    rng: list[dict[str, Tensor]] = []
    for key, value in sorted(rng_flat.items()):
        rank, name = key.split(".", 1)
        while len(rng) <= int(rank):
            rng.append({})
        rng[int(rank)][name] = value
    return state, rng, source
