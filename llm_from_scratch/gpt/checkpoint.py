"""A training state in one safetensors file, whatever the file is called.

    model_state_dict.NAME           weights
    optimizer_state_dict.0.I.STATE  the optimiser's state of parameter number I
    rng.DEVICE                      the generators that dropout draws from
    train_losses, val_losses        the history so far, float64

The header holds the rest as JSON: the step, the GPT's sizes, the trainer's settings. Nothing in
the file can run; a pickle, which can, is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import write_aside
from llm_from_scratch.gpt.model import GPT

STATE = "llm_from_scratch.gpt"
MODEL = "model_state_dict."


def write_checkpoint(path: Path | str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": "pt", STATE: json.dumps(state)}
    with write_aside(path, "wb") as file:
        file.write(save(on_cpu, header))


def read_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a file that `write_checkpoint` wrote, or a `UserError` saying why not."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be read: {error.strerror}.") from error
    try:
        with safe_open(path, framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        if start[:2] == b"PK" or (start[:1] == b"\x80" and start[8:] != b"{"):
            raise UserError(
                f"{path} is a pickle, which can run any program when it is opened: load its "
                "weights with torch.load(path, weights_only=True), put them into the model with "
                "load_state_dict, and save them with save_checkpoint."
            ) from error
        raise UserError(
            f"{path} is truncated or not a safetensors file ({error}): take another checkpoint."
        ) from error
    if STATE not in header:
        raise UserError(
            f"{path} holds tensors but no training state: give a file that "
            "GPTTrainer.save_checkpoint wrote."
        )
    return tensors, json.loads(header[STATE])


def load_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path | str) -> None:
    """Put a checkpoint's weights into the model; one of another shape is a `UserError`."""
    weights = {k.removeprefix(MODEL): v for k, v in tensors.items() if k.startswith(MODEL)}
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        shapes = [tuple(part[name].shape) if name in part else None for part in (own, weights)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path} belongs to another model: '{name}' has the shape {shapes[1]} there and "
                f"{shapes[0]} here. Make the model with the sizes of the checkpoint."
            )
    model.load_state_dict(weights)


def load_gpt(path: Path | str) -> GPT:
    """The model of a checkpoint, in inference mode; its sizes come from the file."""
    tensors, state = read_checkpoint(path)
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn in vain
        model = GPT(**state["sizes"])
    load_weights(model, tensors, path)
    return model.eval()
