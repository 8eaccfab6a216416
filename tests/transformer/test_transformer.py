"""The encoder-decoder transformer: names, shapes, masks, and that it learns."""

from __future__ import annotations

import importlib
import inspect
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import llm_from_scratch.transformer as package
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.transformer.attention import (
    AttentionHead,
    DotProductAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
)
from llm_from_scratch.transformer.transformer import (
    Decoder,
    DecoderBlock,
    Encoder,
    EncoderBlock,
    Transformer,
)
from llm_from_scratch.transformer.utils import (
    LayerNorm,
    PositionalEncoding,
    create_padding_mask,
    create_subsequent_mask,
    layer_norm,
    sinusoidal_position_encoding,
)

SIZES = {
    "max_sequence_len": 12, "d_model": 16, "n_blocks": 2, "n_heads": 2, "d_k": 6, "d_v": 10,
    "d_ff": 24,
}  # fmt: skip


def small(src: int = 11, tgt: int = 13, **changes: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(src, tgt, **{**SIZES, **changes})


def names(thing: object) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name != "self"]  # type: ignore[arg-type]


def test_names_and_signatures() -> None:
    for module in ("attention", "transformer", "utils"):
        importlib.import_module(f"llm_from_scratch.transformer.{module}")
    assert all(hasattr(package, name) for name in package.__all__)
    assert names(DotProductAttention.forward) == ["query", "key", "value"]
    for cls in (ScaledDotProductAttention, AttentionHead, MultiHeadAttention):
        assert names(cls.forward) == ["query", "key", "value", "mask"]
    assert names(AttentionHead) == ["d_k", "d_v", "d_model"]
    assert names(MultiHeadAttention) == ["n_heads", "d_k", "d_v", "d_model"]
    block = ["d_model", "n_heads", "d_k", "d_v", "d_ff"]
    stack = ["vocabulary_size", "max_sequence_len", "d_model", "n_blocks", *block[1:]]
    assert names(EncoderBlock) == names(DecoderBlock) == block
    assert names(Encoder) == names(Decoder) == stack
    assert names(Transformer) == ["src_vocab_size", "tgt_vocab_size", *stack[1:]]
    assert names(Encoder.forward) == names(EncoderBlock.forward) == ["x", "src_padding_mask"]
    seen = ["x", "encoder_output", "tgt_mask", "src_tgt_padding_mask"]
    assert names(Decoder.forward) == names(DecoderBlock.forward) == seen
    assert names(Transformer.forward) == ["src", "tgt", "src_mask", "tgt_mask", "src_tgt_mask"]
    assert names(Transformer.inference)[:3] == ["src", "bos_token", "eos_token"]
    assert names(PositionalEncoding) == ["d_model", "max_sequence_length"]
    assert names(sinusoidal_position_encoding) == ["d_model", "sequence_length"]
    assert names(LayerNorm) == ["d_model", "eps"] and names(layer_norm) == ["x", "eps"]


def test_state_dict_keys() -> None:
    def norm(name: str) -> list[str]:
        return [f"{name}.gamma", f"{name}.beta"]

    def linear(name: str) -> list[str]:
        return [f"{name}.weight", f"{name}.bias"]

    def attention(name: str) -> list[str]:
        heads = [f"{name}.heads.{h}.linear_{part}" for h in range(2) for part in "qkv"]
        return [key for part in [*heads, f"{name}.linear_o"] for key in linear(part)]

    expected = ["linear.weight"]
    for side, attentions, norms in (
        ("encoder", ["attention"], 2),
        ("decoder", ["attention", "attention_source_target"], 3),
    ):
        expected += [f"{side}.embedding.weight", f"{side}.pe.pe"]
        for i in range(2):
            here = f"{side}.blocks.{i}"
            for name in attentions:
                expected += attention(f"{here}.{name}")
            for number in range(1, norms + 1):
                expected += norm(f"{here}.layer_norm{number}")
            expected += linear(f"{here}.feed_forward.0") + linear(f"{here}.feed_forward.2")
    assert sorted(small().state_dict()) == sorted(expected)


def test_attention_is_pytorchs() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    mask = create_padding_mask(torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), pad_token=0)
    ours = ScaledDotProductAttention()(q, k, v, mask)
    assert torch.allclose(ours, F.scaled_dot_product_attention(q, k, v, ~mask), atol=1e-6)
    plain = DotProductAttention()(q, k, v)
    assert torch.allclose(plain, F.scaled_dot_product_attention(q, k, v, scale=1.0), atol=1e-6)


def test_a_query_that_sees_nothing_is_zero_and_has_a_gradient() -> None:
    q = torch.randn(1, 2, 4, requires_grad=True)
    mask = torch.tensor([[[True, True], [False, True]]])
    out = ScaledDotProductAttention()(q, q, q, mask)
    out.square().sum().backward()
    assert out[0, 0].eq(0).all() and out[0, 1].ne(0).any()
    assert q.grad is not None and q.grad.isfinite().all()


def test_norm_divides_by_the_standard_deviation() -> None:
    x = torch.randn(3, 5, 8) * 4 + 1
    std = x.var(-1, keepdim=True, unbiased=False).sqrt()
    assert torch.allclose(layer_norm(x, 0.5), (x - x.mean(-1, keepdim=True)) / (std + 0.5))
    norm = LayerNorm(8)
    assert torch.allclose(norm(x), F.layer_norm(x, (8,)), atol=1e-4)
    flat = torch.ones(1, 8, requires_grad=True)
    norm(flat).sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_positions() -> None:
    table = sinusoidal_position_encoding(6, 9)
    assert table.shape == (1, 9, 6)
    assert table[0, 3, 2].item() == pytest.approx(torch.sin(torch.tensor(3 / 10000 ** (2 / 6))))
    pe = PositionalEncoding(6, 9)
    x = torch.randn(2, 4, 6)
    assert pe.scale == 6**0.5
    assert torch.equal(pe(x), x * 6**0.5 + table[:, :4])
    with pytest.raises(UserError, match="10 tokens are too many"):
        pe(torch.randn(1, 10, 6))


def test_masks() -> None:
    causal = create_subsequent_mask(3)
    assert causal.tolist() == [[[False, True, True], [False, False, True], [False, False, False]]]
    padding = create_padding_mask(torch.tensor([[5, 5, 0], [5, 0, 0]]), 0)
    assert padding.shape == (2, 1, 3)
    assert (causal | padding).shape == (2, 3, 3)


def test_shapes_and_causality() -> None:
    model = small()
    src, tgt = torch.randint(0, 11, (2, 7)), torch.randint(0, 13, (2, 5))
    causal = create_subsequent_mask(5)
    logits = model(src, tgt, None, causal, None)
    assert logits.shape == (2, 5, 13)
    changed = tgt.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 13
    again = model(src, changed, tgt_mask=causal)
    assert torch.allclose(logits[:, :3], again[:, :3], atol=1e-6)
    assert not torch.allclose(logits[:, 3:], again[:, 3:], atol=1e-3)


def test_padding_of_the_source_changes_nothing() -> None:
    model = small()
    src, tgt = torch.randint(1, 11, (1, 4)), torch.randint(0, 13, (1, 5))
    padded = F.pad(src, (0, 3))
    mask = create_padding_mask(padded, 0)
    alone = model(src, tgt)
    assert torch.allclose(model(padded, tgt, mask, None, mask), alone, atol=1e-5)
    assert torch.equal(model.inference(padded, 1, 2, src_mask=mask), model.inference(src, 1, 2))


def greedy_by_forward(model: Transformer, src: torch.Tensor, bos: int, eos: int, n: int) -> list:
    tokens = [bos]
    while len(tokens) <= n and (tokens[-1] != eos or len(tokens) == 1):
        tgt = torch.tensor([tokens])
        logits = model(src, tgt, tgt_mask=create_subsequent_mask(len(tokens)))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def test_inference_is_the_training_forward_step_by_step() -> None:
    model = small(max_sequence_len=30).double()
    src = torch.randint(0, 11, (4, 6))
    together = model.inference(src, bos_token=1, eos_token=2)
    assert together.shape[0] == 4 and together.shape[1] <= 21
    for row in range(4):
        expected = greedy_by_forward(model, src[row : row + 1], 1, 2, 20)
        alone = model.inference(src[row : row + 1], 1, 2)
        assert alone.tolist() == [expected]
        assert together[row, : len(expected)].tolist() == expected
        assert set(together[row, len(expected) :].tolist()) <= {2}
    assert model.inference(src[:1], 1, 99, max_new_tokens=25).shape == (1, 26)
    assert small().inference(src[:1], 1, 99).shape == (1, 13)  # what max_sequence_len has room for


def test_learns_to_reverse() -> None:
    """Strings of 4 digits, written backwards: 0 is padding, 1 begins, 2 ends, digits from 3."""
    torch.manual_seed(0)
    model = Transformer(
        9, 9, max_sequence_len=6, d_model=32, n_blocks=1, n_heads=2, d_k=16, d_v=16, d_ff=64
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(9.0)
    causal = create_subsequent_mask(5)
    for _ in range(200):
        src = torch.randint(3, 9, (32, 4))
        ends = torch.full((32, 1), 1), torch.full((32, 1), 2)
        tgt = torch.cat([ends[0], src.flip(1), ends[1]], dim=1)
        logits = model(src, tgt[:, :-1], tgt_mask=causal)
        loss = F.cross_entropy(logits.flatten(0, 1), tgt[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    written = model.inference(torch.tensor([[3, 4, 5, 8], [8, 8, 3, 6]]), 1, 2)
    assert written.tolist() == [[1, 8, 5, 4, 3, 2], [1, 6, 3, 8, 8, 2]]


def test_running_the_file_prints_two_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(package.__file__ or "").with_name("attention.py")), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.splitlines() == ["one head: (2, 5, 8)", "four heads: (2, 5, 32)"]


def test_short_enough_to_read() -> None:
    folder = Path(package.__file__ or "").parent
    files = [folder / f"{name}.py" for name in ("attention", "utils", "transformer")]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 300
