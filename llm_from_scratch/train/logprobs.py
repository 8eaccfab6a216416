"""Log-probabilities of given tokens, without ever holding the logits of all of them.

    hidden (b, t, m), targets (b, t)  ->  log p(target) (b, t), differentiable

Logits are tokens times vocabulary, by far the largest tables of a training step: 4,096 tokens of a
vocabulary of 150,000 take 2.5 GB, and softmax and gradient the same again. Here they exist for one
tile of tokens and vocabulary entries at a time, in the forward pass, which keeps the logarithm of
each token's sum (a running one, as in FlashAttention), and in the backward pass, which makes the
tiles again (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
arXiv:2411.09009).

Axes: b batch, t time, n tokens, m features of the model, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.layers import Linear

TILE_TOKENS = 1024
TILE_ENTRIES = 4096  # of the vocabulary: 16 MB of fp32 logits per tile


def token_logprobs(
    model: Decoder | EncoderDecoder,
    hidden_btm: Tensor,
    targets_bt: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """log p(target) in nats under softmax(logits / temperature): (b, t) fp32, differentiable.

    `hidden_btm` is what `model.hidden` gives, `targets_bt` the token that follows each position;
    where it is -100 (IGNORED) the result is 0 and no work is done. A model of any family, head and
    precision; what is not a plain matrix (an adapter on the head, packed weights) is applied to one
    piece of the tokens at a time.
    """
    return _logprobs(model, hidden_btm, targets_bt, temperature, entropy=False)[0]


def token_logprobs_and_entropy(
    model: Decoder | EncoderDecoder,
    hidden_btm: Tensor,
    targets_bt: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of each token's distribution (nats; no gradient)."""
    return _logprobs(model, hidden_btm, targets_bt, temperature, entropy=True)


def _logprobs(
    model: Decoder | EncoderDecoder,
    hidden_btm: Tensor,
    targets_bt: Tensor,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and, where they are wanted, entropies (else zeros), both (b, t)."""
    kept_bt = targets_bt != IGNORED
    hidden_nm, targets_n = hidden_btm[kept_bt], targets_bt[kept_bt]
    writer = model.decoder if isinstance(model, EncoderDecoder) else model
    if type(writer.head) in (Linear, nn.Linear) and writer.head.bias is None:
        if writer.config.scale_logits:
            hidden_nm = hidden_nm * writer.config.d_model**-0.5
        found = _TiledLogprobs.apply(
            hidden_nm, writer.head.weight, targets_n, temperature, writer.config.logit_softcap,
            getattr(model, "logits_bias", None), entropy,
        )  # fmt: skip
    else:
        found = _in_pieces(model, hidden_nm, targets_n, temperature)
    logprobs_bt, entropy_bt = (
        torch.zeros(targets_bt.shape, device=hidden_btm.device).masked_scatter(kept_bt, values)
        for values in found
    )
    return logprobs_bt, entropy_bt


class _TiledLogprobs(torch.autograd.Function):
    """The head and log-softmax in one, tile by tile.

    Tiles of one stretch of the vocabulary follow each other, so that its part of the matrix is
    brought into the precision of the activations once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nm: Tensor,
        weight_vm: Tensor,
        targets_n: Tensor,
        temperature: float,
        softcap: float | None,
        bias_v: Tensor | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        n = len(hidden_nm)
        # Per token, over the stretches so far: the largest logit, sum of exp(l - largest), and
        # that of exp(l - largest) * l.
        largest_n = hidden_nm.new_full((n,), -torch.inf, dtype=torch.float32)
        sum_n, moment_n, wanted_n = (torch.zeros_like(largest_n) for _ in range(3))
        for words, weight, bias in stretches(weight_vm, bias_v, hidden_nm.dtype):
            for tokens in pieces(n, TILE_TOKENS):
                logits, _ = tile(hidden_nm[tokens], weight, bias, softcap, temperature)
                target, inside = within(targets_n[tokens], words)
                wanted_n[tokens] += logits.gather(1, target)[:, 0] * inside
                before = largest_n[tokens]
                largest = torch.maximum(before, logits.amax(1))
                shrink = (before - largest).exp_()
                if entropy:
                    powers = (logits - largest[:, None]).exp_()
                    moment = torch.linalg.vecdot(powers, logits)
                    moment_n[tokens] = moment_n[tokens] * shrink + moment
                else:
                    powers = logits.sub_(largest[:, None]).exp_()
                sum_n[tokens] = sum_n[tokens] * shrink + powers.sum(1)
                largest_n[tokens] = largest
                del logits, powers  # before the next tile is made
        log_sum_n = largest_n + sum_n.log()
        ctx.save_for_backward(hidden_nm, weight_vm, targets_n, log_sum_n, bias_v)
        ctx.temperature, ctx.softcap = temperature, softcap
        entropy_n = log_sum_n - moment_n / sum_n if entropy else moment_n
        ctx.mark_non_differentiable(entropy_n)
        return wanted_n - log_sum_n, entropy_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_nm, weight_vm, targets_n, log_sum_n, bias_v = ctx.saved_tensors
        # -1/temperature times what comes from above is a factor of each token: it is put on the
        # states and on their gradient, not on every logit.
        factor_n1 = -grads[0][:, None] / ctx.temperature
        scaled_nm = (hidden_nm * factor_n1).to(hidden_nm.dtype)
        d_hidden = torch.zeros_like(hidden_nm, dtype=torch.float32)
        d_weight = torch.zeros_like(weight_vm) if ctx.needs_input_grad[1] else None
        d_bias = None
        if bias_v is not None and ctx.needs_input_grad[5]:
            d_bias = torch.zeros_like(bias_v)
        for words, weight, bias in stretches(weight_vm, bias_v, hidden_nm.dtype):
            for tokens in pieces(len(hidden_nm), TILE_TOKENS):
                logits, bend = tile(hidden_nm[tokens], weight, bias, ctx.softcap, ctx.temperature)
                slope = logits.sub_(log_sum_n[tokens, None]).exp_()  # softmax - onehot
                target, inside = within(targets_n[tokens], words)
                slope.scatter_add_(1, target, -inside[:, None])
                if d_bias is not None:
                    d_bias[words] += (slope * factor_n1[tokens]).sum(0).to(d_bias.dtype)
                if bend is not None:
                    slope *= bend
                slope = slope.to(hidden_nm.dtype)
                d_hidden[tokens] += slope @ weight
                if d_weight is not None:
                    d_weight[words] += slope.T @ scaled_nm[tokens]
                del logits, bend, slope
        d_hidden *= factor_n1
        return d_hidden.to(hidden_nm.dtype), d_weight, None, None, None, d_bias, None


def pieces(total: int, size: int) -> Iterator[slice]:
    """0..total in pieces of `size`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def stretches(
    weight_vm: Tensor, bias_v: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Stretches of the vocabulary: which entries, their rows of the matrix, and their biases."""
    for words in pieces(len(weight_vm), TILE_ENTRIES):
        yield words, weight_vm[words].to(dtype), None if bias_v is None else bias_v[words]


def tile(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """(fp32 logits of some tokens and entries, the slope of the soft cap at each of them)."""
    logits, bend = (hidden @ weight.T).float(), None
    if softcap is not None:
        share = logits.div_(softcap).tanh_()
        bend = 1 - share.square()
        logits = share.mul_(softcap)
    if bias is not None:
        logits = logits + bias.float()
    return logits if temperature == 1.0 else logits / temperature, bend


def within(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """(targets counted from the stretch's first entry (n, 1), 1 where they lie in it, else 0)."""
    place = targets - words.start
    size = words.stop - words.start
    inside = (place >= 0) & (place < size)
    return place.clamp(0, size - 1)[:, None], inside.float()


def _in_pieces(
    model: Decoder | EncoderDecoder, hidden_nm: Tensor, targets_n: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same through `model.logits`, a piece of the tokens at a time, made anew for gradients."""

    def piece(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = (model.logits(hidden).float() / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy

    writer = model.decoder if isinstance(model, EncoderDecoder) else model
    size = max(1, TILE_TOKENS * TILE_ENTRIES // writer.config.vocab_size)
    found = [
        checkpoint(piece, hidden_nm[p], targets_n[p], use_reentrant=False, preserve_rng_state=True)
        for p in pieces(len(hidden_nm), size)
    ]
    if not found:
        nothing = hidden_nm.new_zeros(0, dtype=torch.float32)
        return nothing, nothing
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
