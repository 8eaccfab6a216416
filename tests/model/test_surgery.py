"""Growing, cutting and modernising: what each step promises to keep is kept, to the last digit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.layers import activate
from llm_from_scratch.model.modernise import (
    to_grouped,
    to_rms_norm,
    to_rope,
    to_swiglu,
    without_biases,
)
from llm_from_scratch.model.positions import angles
from llm_from_scratch.model.presets import FAMILIES, ModelSettings, resolve
from llm_from_scratch.model.surgery import (
    add_tokens,
    drop_layers,
    extend_context,
    grow_vocabulary,
    on_side,
    rebuild,
    tie,
    untie,
)
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.weights.families import family_of
from llm_from_scratch.weights.folder import load_folder, save_folder

Model = Decoder | Encoder | EncoderDecoder


def randomise(model: nn.Module, seed: int = 2) -> None:
    """Biases, norms and tables are drawn as well, so that nothing is kept by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.6, 0.3, generator=generator)
            elif "embedding" in name or "positions" in name:
                parameter.normal_(0.1, 0.5, generator=generator)


def made(family: str = "llama", vocab_size: int = 83, **settings: Any) -> Decoder:
    config_changes = {
        k: settings.pop(k) for k in list(settings) if k not in ModelSettings.__annotations__
    }
    values = {
        "d_model": 24, "n_layers": 3, "n_heads": 4, "d_ff": 40, "init_std": 0.3, **settings,
    }  # fmt: skip
    config = resolve(ModelSettings(family=family, **values), vocab_size, 32)
    model = Decoder(dataclasses.replace(config, **config_changes))
    model.initialise(seed=1)
    randomise(model)
    return model.eval()


def ids(length: int = 20, vocab_size: int = 83, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, vocab_size, (rows, length), generator=generator)


def logits_of(model: Decoder, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens)


def assert_same(got: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    scale = float(wanted.abs().max())
    assert wanted.std() > 0.05 * scale
    torch.testing.assert_close(got / scale, wanted / scale, atol=tolerance, rtol=0)


def assert_theirs_agrees(model: Decoder, folder: Path, length: int) -> None:
    """What is saved loads in the reference library, completely, and gives the same logits."""
    save_folder(model, None, folder)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = ids(length, model.config.vocab_size)
    with torch.no_grad():
        assert_same(theirs.eval()(tokens).logits, logits_of(model, tokens), 2e-5)
    again, _ = load_folder(folder)
    assert dataclasses.replace(again.config, family="") == dataclasses.replace(
        model.config, family=""
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat. " * 40], vocab_size=270)


def test_a_new_model_shares_nothing_with_the_old_one() -> None:
    for tied in (True, False):
        old = made(tie_embeddings=tied).to(torch.bfloat16).train()
        old.compute_dtype = torch.float32
        before = {name: p.detach().clone() for name, p in old.named_parameters()}
        new = rebuild(old, old.config)
        assert new.training and new.compute_dtype == torch.float32
        assert new.embedding.weight.dtype == torch.bfloat16
        assert (new.head.weight is new.embedding.weight) == tied
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.zero_()
        assert all(torch.equal(before[name], p) for name, p in old.named_parameters())


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens(family: str, tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    v = tokenizer.vocab_size
    old = made(family, vocab_size=v, tie_embeddings=tied)
    new, grown = add_tokens(old, tokenizer, ["<|user|>", "<|end|>", "mat"], special=True)
    assert (tokenizer.vocab_size, old.config.vocab_size) == (v, v)
    added = grown.vocab_size - v
    assert added >= 2
    assert new.config.vocab_size == v + added
    tokens = grown.encode("<|user|>the cat<|end|>", special=True)
    assert tokens[0] == v and tokens[-1] == v + 1
    text = ids(20, v)
    before, after = logits_of(old, text), logits_of(new, text)
    assert_same(after[..., :v], before)
    mean = before.mean(-1, keepdim=True).expand(-1, -1, added)
    torch.testing.assert_close(after[..., v:], mean, atol=1e-5, rtol=1e-5)
    taken = after.softmax(-1)[..., v:].sum(-1)
    assert (taken < added / (added + v)).all()
    rest = after[..., :v].log_softmax(-1)
    torch.testing.assert_close(rest, before.log_softmax(-1), atol=1e-5, rtol=1e-5)
    assert_theirs_agrees(new, tmp_path / "model", 20)
    save_folder(new, grown, tmp_path / "model")
    assert load_folder(tmp_path / "model")[1].encode("<|end|>", special=True) == [v + 1]  # type: ignore[union-attr]


def test_spare_rows_are_used_before_new_ones(tokenizer: Tokenizer) -> None:
    v = tokenizer.vocab_size
    old = made(vocab_size=v + 5)
    new, grown = add_tokens(old, tokenizer, ["<a>", "<b>"])
    assert (grown.vocab_size, new.config.vocab_size) == (v + 2, v + 5)
    rows, before = new.embedding.weight, old.embedding.weight
    mean = before[:v].mean(0)
    torch.testing.assert_close(rows[v : v + 2], mean.expand(2, -1))
    assert torch.equal(rows[v + 2 :], before[v + 2 :])
    with pytest.raises(UserError, match="do not belong together"):
        add_tokens(made(vocab_size=v - 1), tokenizer, ["<a>"])


def encoder_decoder() -> EncoderDecoder:
    fields: dict[str, Any] = {
        "vocab_size": 50, "d_model": 24, "n_heads": 4, "n_kv_heads": 4, "head_dim": 6, "d_ff": 40,
        "max_seq_len": 16, "position": "learned", "position_offset": 2, "residual": "post",
        "norm": "layer", "activation": "gelu", "gated": False, "attention_bias": True,
        "output_bias": True, "feed_forward_bias": True, "family": "bart", "final_norm": False,
        "embedding_norm": True,
    }  # fmt: skip
    encoder = ModelConfig(**fields, n_layers=2, causal=False)
    decoder = ModelConfig(**fields, n_layers=3, cross_attention=True)
    model = EncoderDecoder(EncoderDecoderConfig(encoder, decoder, start_id=1, logits_bias=True))
    model.initialise(1)
    randomise(model)
    return model.eval()


def test_an_encoder_decoder_grows_on_both_sides() -> None:
    old = encoder_decoder()
    new = grow_vocabulary(old, 50, 53)
    source, target = ids(9, 50), ids(7, 50)
    with torch.no_grad():
        before, after = old(source, target), new(source, target)
    assert after.shape[-1] == 53
    assert_same(after[..., :50], before)
    torch.testing.assert_close(after[..., 50:], before.mean(-1, keepdim=True).expand(-1, -1, 3))
    assert new.decoder.embedding.weight is new.encoder.embedding.weight
    longer = extend_context(old, 40, "repeat")
    with torch.no_grad():
        assert torch.equal(longer(source, target), before)
        assert longer(ids(40, 50), ids(40, 50)).isfinite().all()
    assert len(longer.decoder.positions.weight) == 42
    smaller = on_side(old, "decoder", lambda stack: drop_layers(stack, [0, 2]))
    assert (smaller.config.encoder.n_layers, smaller.config.decoder.n_layers) == (2, 2)
    with torch.no_grad():
        assert torch.equal(smaller.encoder(source), old.encoder(source))
    with pytest.raises(UserError, match="no side 'middle'"):
        on_side(old, "middle", lambda stack: stack)


# --- context -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["yarn", "linear", "llama3", "theta"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_a_longer_rotary_context(how: str, family: str, tmp_path: Path) -> None:
    old = made(family, rope_theta=500.0)
    new = extend_context(old, 80, how)
    assert new.config.max_seq_len == 80
    with pytest.raises(UserError, match="context is 32"):
        old(ids(80))
    assert_theirs_agrees(new, tmp_path / "model", 80)
    # Going on is one step as well: 32 -> 80 -> 160 is 32 -> 160; a scaling goes on unnamed.
    again = how if how == "theta" else None
    both, once = extend_context(new, 160, again), extend_context(old, 160, how)
    torch.testing.assert_close(both.frequencies, once.frequencies, rtol=1e-5, atol=0)


def test_what_each_stretching_keeps() -> None:
    old = made(d_model=64, n_heads=2, rope_theta=500.0)
    positions = torch.arange(32)
    before = angles(positions, old.frequencies)
    linear = extend_context(old, 128, "linear")
    torch.testing.assert_close(angles(positions * 4, linear.frequencies), before)
    for how in ("theta", "yarn", "llama3"):
        slower = extend_context(old, 128, how).frequencies
        torch.testing.assert_close(slower[-1], old.frequencies[-1] / 4)
        assert torch.equal(slower[0], old.frequencies[0])
    assert extend_context(old, 128).config.rope_scaling.kind == "yarn"  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["stretch", "repeat"])
def test_a_longer_table_of_positions(how: str, tmp_path: Path) -> None:
    old = made("gpt2")
    new = extend_context(old, 75, how)
    before, after = old.positions.weight.detach(), new.positions.weight.detach()
    if how == "repeat":
        assert torch.equal(after, torch.cat([before, before, before[:11]]))
        assert torch.equal(logits_of(new, ids(32)), logits_of(old, ids(32)))
    else:
        assert torch.equal(after[[0, -1]], before[[0, -1]])
        # Row p of 75 stands at p * 31 / 74 of 32.
        place = torch.tensor(30 * 31 / 74)
        low, share = int(place), place - int(place)
        torch.testing.assert_close(after[30], before[low] * (1 - share) + before[low + 1] * share)
    assert_theirs_agrees(new, tmp_path / "model", 75)


def test_texts_that_fitted_are_read_as_before_where_positions_know_no_length() -> None:
    for position in ("sinusoidal", "none"):
        old = made("gpt2", position=position)
        new = extend_context(old, 64)
        assert torch.equal(logits_of(new, ids(32)), logits_of(old, ids(32)))
        assert logits_of(new, ids(64)).isfinite().all()
        with pytest.raises(UserError, match="leave it out"):
            extend_context(old, 64, "yarn")


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        ("llama", lambda m: extend_context(m, 32), "is 32 tokens already"),
        ("llama", lambda m: extend_context(m, 64, "stretch"), "'stretch' is no way to extend rope"),
        ("gpt2", lambda m: extend_context(m, 64, "yarn"), "there are stretch, repeat"),
        ("llama", lambda m: extend_context(extend_context(m, 64, "yarn"), 99, "linear"),
         "go on with 'yarn' or 'theta'"),
        ("llama", lambda m: tie(m, "both"), "must be one of embedding, head, mean"),
        ("llama", lambda m: drop_layers(m, []), "keep is"),
        ("llama", lambda m: drop_layers(m, [0, 3]), "blocks 0 to 2"),
        ("llama", to_rope, "its positions must be learned"),
        ("llama", to_swiglu, "must have no gate"),
        ("llama", to_rms_norm, "must have layer norms"),
        ("gpt2", to_rms_norm, "untie"),
        ("olmo2", lambda m: to_grouped(m, 2), "not be normed all together"),
        ("gpt2", lambda m: to_grouped(m, 3), "4 key-value heads cannot be shared out among 3"),
        ("gpt2", lambda m: without_biases(m, []), "give some batches"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(
    family: str, change: Callable[[Decoder], Decoder], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        change(made(family))


# --- tied, untied, fewer layers ------------------------------------------------------------------


def test_untied_says_the_same_and_tied_again_as_well(tmp_path: Path) -> None:
    old = made("gpt2")
    apart = untie(old)
    assert torch.equal(logits_of(apart, ids()), logits_of(old, ids()))
    assert apart.head.weight is not apart.embedding.weight
    assert_theirs_agrees(apart, tmp_path / "apart", 32)
    for keep in ("embedding", "head", "mean"):
        assert torch.equal(logits_of(tie(apart, keep), ids()), logits_of(old, ids()))
    with torch.no_grad():
        apart.head.weight.mul_(3)
    torch.testing.assert_close(tie(apart, "head").embedding.weight, apart.head.weight)
    torch.testing.assert_close(tie(apart, "mean").embedding.weight, old.embedding.weight * 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2", "gpt_neox"])
def test_blocks_that_add_nothing_are_dropped_exactly(family: str) -> None:
    old = made(family, n_layers=4)
    with torch.no_grad():
        for layer in (1, 3):
            for name, parameter in old.blocks[layer].named_parameters():
                last = ("attention.o", "feed_forward.down")
                norm = ("attention_norm", "attention_end_norm", "feed_forward_norm",
                        "feed_forward_end_norm")  # fmt: skip
                if name.startswith(last):
                    parameter.zero_()
                if family in ("gemma2", "olmo2") and name.startswith(norm):
                    parameter.zero_()
    new = drop_layers(old, keep=[0, 2])
    assert new.config.n_layers == 2
    assert_same(logits_of(new, ids()), logits_of(old, ids()))


def test_windows_and_experts_move_with_their_blocks(tmp_path: Path) -> None:
    windowed = made("gemma2", n_layers=5, window=6)
    assert windowed.config.window_layers == (0, 2, 4)
    new = drop_layers(windowed, keep=[1, 2, 4])
    assert new.config.window_layers == (1, 2)
    assert_theirs_agrees(new, tmp_path / "windows", 32)
    none_left = drop_layers(windowed, keep=[1, 3])
    assert (none_left.config.window, none_left.config.window_layers) == (None, ())
    mixture = made("qwen3_moe", n_layers=4, n_experts=3)
    experts = dataclasses.replace(mixture.config.experts, layers=(1, 3))  # type: ignore[type-var]
    mixture = Decoder(dataclasses.replace(mixture.config, experts=experts)).eval()
    mixture.initialise(2)
    fewer = drop_layers(mixture, keep=[3, 0, 1])
    assert fewer.config.experts is not None
    assert fewer.config.experts.layers == (0, 2)
    assert torch.equal(fewer.blocks[2].feed_forward.up, mixture.blocks[1].feed_forward.up)
    assert_theirs_agrees(fewer, tmp_path / "experts", 32)


def test_a_block_may_stand_twice_but_the_odd_first_one_stays_first() -> None:
    old = made()
    assert torch.equal(
        logits_of(drop_layers(old, [0, 1, 1, 2]), ids()),
        logits_of(drop_layers(drop_layers(old, [0, 1, 1, 2]), [0, 2, 1, 3]), ids()),
    )
    config = dataclasses.replace(
        old.config, causal=False, first_norm=False, norm="layer_no_bias", n_layers=3
    )
    encoder = Encoder(config)
    assert drop_layers(encoder, [0, 2]).config.n_layers == 2
    with pytest.raises(UserError, match="keep it, and first"):
        drop_layers(encoder, [1, 2])


# --- from GPT-2 to Llama -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_layer_norms_become_rms_norms_exactly(family: str) -> None:
    old = untie(made(family))
    new = to_rms_norm(old)
    assert new.config.norm == "rms"
    assert not any(name.endswith("norm.bias") for name, _ in new.named_parameters())
    with torch.no_grad():
        wanted = old.hidden(ids()) - old.final_norm.bias  # the one bias that has no place
        assert_same(new.hidden(ids()), wanted)
        old.final_norm.bias.zero_()
    assert_same(logits_of(to_rms_norm(old), ids()), logits_of(old, ids()))


def test_rms_norms_without_a_bias_to_begin_with() -> None:
    old = untie(made("gpt2", norm="layer_no_bias", attention_bias=False, feed_forward_bias=False,
                     output_bias=False))  # fmt: skip
    new = to_rms_norm(old)
    assert not any(name.endswith("bias") for name, _ in new.named_parameters())
    assert_same(logits_of(new, ids()), logits_of(old, ids()))


def apart(first: Decoder, second: Decoder, tokens: Tensor) -> float:
    """Mean KL divergence of what two models predict, in nats."""
    a, b = (logits_of(m, tokens).log_softmax(-1) for m in (first, second))
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_text_lets_the_head_take_up_the_last_bias() -> None:
    old = untie(made("gpt2", d_model=48))
    text, other = ids(32, rows=24), ids(31)
    lost, kept = to_rms_norm(old), to_rms_norm(old, [text])
    assert apart(old, kept, other) < 0.2 * apart(old, lost, other)


def test_rotary_positions_keep_what_all_positions_shared() -> None:
    old = made("gpt2")
    with torch.no_grad():
        old.positions.weight.copy_(old.positions.weight[:1].expand(32, -1))
    new = to_rope(old)
    assert new.config.position == "rope"
    # Tied: the head moves with the embedding, by the same for every entry.
    one = ids(1, rows=20)
    torch.testing.assert_close(
        logits_of(new, one).softmax(-1), logits_of(old, one).softmax(-1), atol=1e-5, rtol=1e-4
    )
    assert apart(old, new, ids()) > 1e-3


@pytest.mark.parametrize("biased", [True, False])
def test_a_gate_is_put_in_exactly(biased: bool) -> None:
    old = made("gpt2", activation="silu", feed_forward_bias=biased)
    new = to_swiglu(old)
    assert new.config.gated
    assert_same(logits_of(new, ids()), logits_of(old, ids()))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_gelu_becomes_silu_nearly(activation: str) -> None:
    most = 0.035 if activation == "relu" else 0.021
    old = made("gpt2", activation=activation)
    ours, wanted = to_swiglu(old).blocks[0].feed_forward, old.blocks[0].feed_forward
    x = torch.linspace(-30, 30, 4001)[:, None] * torch.randn(24, generator=torch.Generator())
    with torch.no_grad():
        bent = torch.nn.functional.silu(ours.gate(x)) * ours.up(x)
        error = (bent - activate(wanted.up(x), activation)).abs().max()
    assert 0.5 * most < error < most


@pytest.mark.parametrize("biased", [True, False])
def test_equal_heads_are_grouped_exactly(biased: bool, tmp_path: Path) -> None:
    old = made("llama", attention_bias=biased, output_bias=biased)
    with torch.no_grad():
        for block in old.blocks:
            for part in (block.attention.k, block.attention.v):
                for tensor in part.parameters():
                    heads = tensor.view(2, 2, 6, -1)
                    heads[:, 1] = heads[:, 0]
    new = to_grouped(old, 2)
    assert new.config.n_kv_heads == 2
    assert new.blocks[0].attention.k.weight.shape == (12, 24)
    assert_same(logits_of(new, ids()), logits_of(old, ids()))
    assert_theirs_agrees(new, tmp_path / "model", 32)


def test_a_group_s_keys_are_the_mean_of_its_heads() -> None:
    old = made("gpt2")
    new = to_grouped(to_grouped(old, 2), 1)
    heads = old.blocks[1].attention.v.weight.view(4, 6, 24)
    torch.testing.assert_close(new.blocks[1].attention.v.weight, heads.mean(0))


def test_biases_of_zero_and_of_keys_are_dropped_exactly() -> None:
    old = made("gpt2")
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            if name.endswith(".bias") and "norm" not in name and "attention.k" not in name:
                parameter.zero_()
    new = without_biases(old)
    names = [name for name, _ in new.named_parameters() if name.endswith("bias")]
    assert all("norm" in name for name in names)
    assert_same(logits_of(new, ids()), logits_of(old, ids()))
    assert apart(to_rope(old), without_biases(to_rope(old)), ids()) > 1e-4


def test_text_lets_the_matrices_take_up_the_biases() -> None:
    old = made("gpt2", d_model=48)
    text, other = ids(32, rows=24), ids(31)
    lost, kept = without_biases(old), without_biases(old, [text[:12], text[12:]])
    assert apart(old, kept, other) < 0.2 * apart(old, lost, other)
    assert apart(old, without_biases(old), other) > 1e-3


def test_all_steps_together_are_a_llama(tmp_path: Path) -> None:
    model = made("gpt2", max_seq_len=64)
    text = [ids(32, rows=8)]
    steps: list[Callable[[Decoder], Decoder]] = [
        untie, lambda m: to_rms_norm(m, text), to_rope, lambda m: to_grouped(m, 2), to_swiglu,
        lambda m: without_biases(m, text),
    ]  # fmt: skip
    for number, step in enumerate(steps):
        model = step(model)
        assert logits_of(model, ids(32)).isfinite().all()
        if number == 2:  # rotary and RMS norms, but no gate: nobody's model
            with pytest.raises(UserError, match="No Hugging Face class"):
                family_of(model.config)
    assert family_of(model.config).name == "llama"
    assert_theirs_agrees(model, tmp_path / "model", 64)
    loaded, _ = load_folder(tmp_path / "model")
    assert loaded.config.family == "llama"
    plain = resolve(
        ModelSettings(d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=40, init_std=0.3,
                      tie_embeddings=False, max_seq_len=64), 83, 32,
    )  # fmt: skip
    assert loaded.config == plain
    assert "llama" in FAMILIES
