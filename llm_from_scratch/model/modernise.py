"""From GPT-2 to Llama, one step at a time: norms, positions, feed-forward, heads, biases.

Each function takes a `Decoder` and returns a new one, in any order that its checks allow. What a
step keeps exactly is said and tested; what it does not keep comes back with a little training. The
steps in between may be models that no published class can hold; the last one is a Llama.

Two steps can be told some text (`batches`). Where a bias has to go they then put in its place, into
the matrix beside it, what comes closest to a constant on that text: a direction w with w x near 1
for all of the matrix's inputs x, so that (W + b w^T) x is near W x + b.

Axes: n tokens, i inputs and o outputs of a matrix, m features of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.layers import Linear
from llm_from_scratch.model.positions import doubled
from llm_from_scratch.model.surgery import rebuild, refuse_few_bits

Batches = Iterable[Tensor]


def check(model: Decoder, remedy: str, **wanted: Any) -> ModelConfig:
    """The config, or a `UserError` where a field is none of the values wanted of it."""
    refuse_few_bits(model)
    for name, values in wanted.items():
        if getattr(model.config, name) not in values:
            raise UserError(
                f"This step cannot take a model whose {name} is {getattr(model.config, name)!r}; "
                + remedy
            )
    return model.config


def parameters_of(model: Decoder) -> dict[str, Tensor]:
    """All parameters by name, a tied head among them."""
    return dict(model.named_parameters(remove_duplicate=False))


def matrices_of(model: Decoder) -> list[str]:
    """The names of the matrices in the blocks: blocks.0.attention.q, ..."""
    return [
        name for name, part in model.named_modules()
        if isinstance(part, Linear) and name.startswith("blocks.")
    ]  # fmt: skip


# --- what is nearly constant ---------------------------------------------------------------------


@torch.no_grad()
def constant_directions(
    model: Decoder, names: list[str], batches: Batches, ridge: float = 1e-4
) -> dict[str, Tensor]:
    """For the inputs x of each named module, the w (i,) with w x nearest to 1 on the text.

    Least squares: (sum x x^T + ridge) w = sum x, with the ridge as a share of the mean square.
    """
    squares: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_ni = doubled(inputs[0].flatten(0, -2))
        squares[name] = squares.get(name, 0) + x_ni.T @ x_ni
        sums[name] = sums.get(name, 0) + x_ni.sum(0)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in names
    ]
    training = model.training
    try:
        model.eval()
        for tokens_bt in batches:
            model(tokens_bt)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not sums:
        raise UserError("There is no text to measure the model's states on: give some batches.")
    found = {}
    for name in names:
        square = squares[name]
        small = ridge * square.diagonal().mean()
        eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
        found[name] = torch.linalg.solve(square + small * eye, sums[name])
    return found


def absorbed(weight_oi: Tensor, bias_o: Tensor, w_i: Tensor) -> Tensor:
    """W + b w^T."""
    more_oi = torch.outer(doubled(bias_o), doubled(w_i))
    return (doubled(weight_oi) + more_oi).to(weight_oi)


# --- the steps -----------------------------------------------------------------------------------


@torch.no_grad()
def to_rms_norm(model: Decoder, batches: Batches | None = None) -> Decoder:
    """Layer norms become RMS norms, exactly (Jiang et al., arXiv:2305.14858), but for one bias.

    A layer norm is an RMS norm of what is left once the mean over the features is taken away. So
    the mean is taken out of everything that writes into the stream (embedding, positions, last
    matrices of the branches), and there is none to take away later. The norms' biases move into
    those of the matrices behind them. The last norm's bias is lost, because no bias stands behind
    it; with `batches` the output matrix takes it up, nearly.
    """
    config = check(
        model, "it must have layer norms in front of its branches and untied matrices (`untie`).",
        norm=("layer", "layer_no_bias"), residual=("pre", "parallel"), tie_embeddings=(False,),
        embedding_norm=(False,), qk_norm=(None,), cross_attention=(False,), experts=(None,),
        first_norm=(True,), final_norm=(True,), position=("rope", "learned", "none"),
    )  # fmt: skip
    changed = replace(config, norm="rms")
    if config.norm == "layer":
        changed = replace(changed, attention_bias=True, feed_forward_bias=True)
    old = parameters_of(model)
    values: dict[str, Tensor] = {}
    for name in ("embedding.weight", "positions.weight"):
        if name in old:
            values[name] = old[name] - old[name].mean(-1, keepdim=True)
    for name in matrices_of(model):
        weight, bias = old[f"{name}.weight"], old.get(f"{name}.bias")
        if bias is None:
            bias = weight.new_zeros(len(weight))
        if name.endswith(("attention.o", "feed_forward.down")):
            weight, bias = weight - weight.mean(0), bias - bias.mean()
        elif config.norm == "layer":
            branch = name.rpartition(".")[0]  # blocks.0.attention
            bias = bias + weight @ old[f"{branch}_norm.bias"]
        values |= {f"{name}.weight": weight, f"{name}.bias": bias}
    if config.norm == "layer" and batches is not None:
        beta, head = old["final_norm.bias"], old["head.weight"]
        # What will reach the head is what reaches it now, less the bias.
        without = rebuild(model, config, {"final_norm.bias": torch.zeros_like(beta)})
        w = constant_directions(without, ["head"], batches)["head"]
        values["head.weight"] = absorbed(head, head @ beta, w)
    return rebuild(model, changed, values)


@torch.no_grad()
def to_rope(model: Decoder, theta: float = 10_000.0) -> Decoder:
    """Learned positions become rotary ones. What the model knew of order must be learnt again.

    The mean of the positions' rows, which every token had, moves into the embedding. Exact for a
    text of one token if all rows were equal, and for nothing else.
    """
    config = check(model, "its positions must be learned.", position=("learned",))
    old = parameters_of(model)
    mean = old["positions.weight"][config.position_offset :].float().mean(0)
    if config.scale_embedding:
        mean = mean / config.d_model**0.5
    embedding = (old["embedding.weight"].float() + mean).to(old["embedding.weight"].dtype)
    changed = replace(config, position="rope", position_offset=0, rope_theta=theta)
    return rebuild(model, changed, {"embedding.weight": embedding})


# GELU(x) is nearly x * sigmoid(1.702 x) (Hendrycks & Gimpel, arXiv:1606.08415): apart by 0.0207.
SIGMOID_SCALE = 1.702


@torch.no_grad()
def to_swiglu(model: Decoder) -> Decoder:
    """The feed-forward gets a gate and SiLU, in place of GELU (or SiLU, or ReLU) alone.

    The widening matrix becomes the gate, and what it is multiplied with is 1 everywhere: a matrix
    of zeros with a bias of ones, ready to learn. So far that is exact. GELU becomes SiLU by
    GELU(x) ~ SiLU(1.702 x) / 1.702, off by at most 0.021 in each feature; from SiLU it is exact;
    ReLU(x) ~ SiLU(8 x) / 8 is off by at most 0.035. The number of parameters grows by half of the
    feed-forward's.
    """
    config = check(
        model, "its feed-forward must have no gate and no experts.",
        gated=(False,), experts=(None,), activation=("gelu", "gelu_tanh", "silu", "relu"),
    )  # fmt: skip
    scale = {"silu": 1.0, "relu": 8.0}.get(config.activation, SIGMOID_SCALE)
    changed = replace(config, gated=True, activation="silu", feed_forward_bias=True)
    old = parameters_of(model)
    values: dict[str, Tensor] = {}
    for layer in range(config.n_layers):
        here = f"blocks.{layer}.feed_forward."
        weight, zeros = old[f"{here}up.weight"], old[f"{here}up.weight"].new_zeros(config.d_ff)
        values |= {
            f"{here}gate.weight": weight * scale,
            f"{here}gate.bias": old.get(f"{here}up.bias", zeros) * scale,
            f"{here}up.weight": torch.zeros_like(weight),
            f"{here}up.bias": zeros + 1 / scale,
            f"{here}down.bias": old.get(f"{here}down.bias", weight.new_zeros(config.d_model)),
        }
    return rebuild(model, changed, values)


@torch.no_grad()
def to_grouped(model: Decoder, n_kv_heads: int) -> Decoder:
    """Neighbouring heads share their keys and values: each group's are the mean of its heads'.

    Exact where the heads of a group were equal in both; else a few hundredths of the original
    training bring the model back (Ainslie et al., arXiv:2305.13245). The cache becomes smaller by
    the same factor.
    """
    config = check(model, "its queries and keys must not be normed all together.",
                   qk_norm=(None, "head"))  # fmt: skip
    if n_kv_heads < 1 or config.n_kv_heads % n_kv_heads:
        raise UserError(
            f"{config.n_kv_heads} key-value heads cannot be shared out among {n_kv_heads}; give a "
            "number that divides them."
        )
    group = config.n_kv_heads // n_kv_heads
    values = {}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and name.split(".")[-2] in ("k", "v"):
            heads = parameter.unflatten(0, (n_kv_heads, group, config.head_dim))
            values[name] = heads.mean(1).flatten(0, 1)
    return rebuild(model, replace(config, n_kv_heads=n_kv_heads), values)


@torch.no_grad()
def without_biases(model: Decoder, batches: Batches | None = None) -> Decoder:
    """No matrix has a bias any more.

    Exact where they were zero. Those of keys never mattered unless positions are rotary or keys are
    normed: they add the same to every score of a query, which the softmax does not see. The others
    are lost; with `batches` the matrices take them up, nearly.
    """
    config, old = model.config, parameters_of(model)
    names = [n for n in matrices_of(model) if f"{n}.bias" in old and bool(old[f"{n}.bias"].any())]
    if config.position != "rope" and config.qk_norm is None:
        names = [name for name in names if not name.endswith(".k")]
    directions: dict[str, Tensor] = {}
    if batches is not None and names:
        directions = constant_directions(model, names, batches)
    changed = replace(config, attention_bias=False, output_bias=False, feed_forward_bias=False)
    values = {
        f"{name}.weight": absorbed(old[f"{name}.weight"], old[f"{name}.bias"], w)
        for name, w in directions.items()
    }
    return rebuild(model, changed, values)
