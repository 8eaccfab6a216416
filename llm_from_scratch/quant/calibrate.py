"""Calibration: run some text through a model and see what goes into its matrices.

Block by block: the text's states enter a block, what its matrices meet is summed up, the block is
changed (quantised, pruned), and the states that leave the changed block enter the next one. So each
block is fitted to what it will really see, and two passes through every block are all it takes.
Nothing here knows what a block computes: it takes the states first, and gives the new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError

# What a model is called with: token ids (batch, time), or several arguments.
Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
Treat = Callable[[str, nn.Module, Callable[[str], Tensor]], None]


class InputSums:
    """What goes into some linear layers while the block runs: the sum of x x^T, or of x^2 alone.

    Layers that are given the same tensor (queries, keys and values) share one sum.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, full: bool) -> None:
        self.layers = layers
        self.full = full
        self.tokens: dict[str, int] = dict.fromkeys(layers, 0)
        self._sums: dict[str, Tensor] = {}
        self._same_as: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> InputSums:
        for name, layer in self.layers.items():
            handle = layer.register_forward_pre_hook(
                lambda _, arguments, name=name: self._add(name, arguments[0])
            )
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._last = None

    def _add(self, name: str, x: Tensor) -> None:
        x_ni = x.detach().flatten(0, -2)
        self.tokens[name] += len(x_ni)
        if self._last is not None and self._last[1] is x:
            first = self._same_as.setdefault(name, self._last[0])
            if first == self._last[0]:
                return
        assert name not in self._same_as, f"'{name}' shares its input in some batches only"
        self._last = (name, x)
        x_ni = x_ni.float()
        total = x_ni.t() @ x_ni if self.full else x_ni.square().sum(0)
        if name in self._sums:
            self._sums[name] += total
        else:
            self._sums[name] = total

    def of(self, name: str) -> Tensor:
        """(inputs, inputs) with `full`, else (inputs,): the mean over all tokens, fp32."""
        if self.tokens[name] == 0:
            raise UserError(
                f"The calibration text never reaches '{name}'; give more or other text, or use a "
                "method without calibration."
            )
        return self._sums[self._same_as.get(name, name)] / self.tokens[name]


class _Reached(Exception):
    """Thrown at the first block: what lies behind it is not needed yet."""


def piles(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of blocks in a model, with the names of their parameters' beginnings, in order."""
    for name, module in model.named_modules():
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.ModuleList):
            yield f"{name}.blocks." if name else "blocks.", blocks


@torch.no_grad()
def walk(
    model: nn.Module,
    batches: Iterable[Batch],
    wanted: Callable[[str], bool],
    treat: Callable[[str, nn.Module, Tensor], None],
    *,
    full: bool,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Show every wanted linear layer what it meets, and let `treat` change it.

    Args:
        model: anything with lists called `blocks`; in inference mode.
        batches: what the model is called with; all of it is kept in memory as states of one block.
        wanted: whether the layer of this name is to be treated.
        treat: takes the name, the layer and the mean of x x^T (`full`) or of x^2 over all tokens.
        report: told which block is at work.
    """
    kept = list(batches)
    for prefix, blocks in piles(model):
        states = [_first_states(model, blocks[0], batch) for batch in kept]
        for number, block in enumerate(blocks):
            report(f"{prefix.replace('blocks.', 'block ')}{number + 1} of {len(blocks)}")
            layers = {
                f"{prefix}{number}.{name}": layer
                for name, layer in block.named_modules()
                if isinstance(layer, nn.Linear) and wanted(f"{prefix}{number}.{name}")
            }
            if layers:
                with InputSums(layers, full=full) as sums:
                    for arguments, named in states:
                        block(*arguments, **named)
                for name, layer in layers.items():
                    treat(name, layer, sums.of(name))
            for place, (arguments, named) in enumerate(states):
                states[place] = ((block(*arguments, **named), *arguments[1:]), named)


def _first_states(
    model: nn.Module, first: nn.Module, batch: Batch
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the first block of a pile is called with for one batch."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def take(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((arguments, named))
        raise _Reached

    handle = first.register_forward_pre_hook(take, with_kwargs=True)
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*(batch if isinstance(batch, tuple) else (batch,)))
    except _Reached:
        pass
    finally:
        handle.remove()
    assert found, "the model ran without its blocks"
    return found[0]
