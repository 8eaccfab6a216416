"""Adapters and frozen layers: what they change, what learns, what is merged."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.adapters import (
    adapted_layers,
    adapter_names,
    freeze_layers,
    merged,
    rows_with,
    use_adapter,
    without_adapters,
)
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.heads import HeadConfig, make_head
from llm_from_scratch.model.lora import KINDS, LoraSettings, add_lora, switch_of
from llm_from_scratch.model.low_rank import Adapted, AdaptedLinear
from llm_from_scratch.quant.base import pack_base
from llm_from_scratch.quant.linear import QuantLinear

SIZES = {
    "vocab_size": 83, "d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16,
    "d_ff": 128, "max_seq_len": 40,
}  # fmt: skip
TOKENS = torch.randint(0, 83, (3, 11), generator=torch.Generator().manual_seed(0))


def make_decoder(**changes: object) -> Decoder:
    model = Decoder(ModelConfig(**{**SIZES, **changes}))  # type: ignore[arg-type]
    model.initialise(1)
    return model.eval()


def scramble(model: nn.Module, seed: int = 0, name: str = "default") -> None:
    """Let the adapters of that name change something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            adapter = layer.named(name)
            for part in [] if adapter is None else [adapter.a, adapter.b]:
                part.copy_(torch.empty(part.shape).normal_(generator=generator) * 0.2)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_nothing_until_it_has_learnt(kind: str) -> None:
    model = make_decoder()
    before = model(TOKENS)
    add_lora(model, LoraSettings(rank=4, kind=kind), seed=3)
    torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=1e-6)
    model(TOKENS).square().sum().backward()
    assert all("adapters" in name for name in trained(model))
    layers = [part for part in model.modules() if isinstance(part, AdaptedLinear)]
    assert len(layers) == 7 * 3  # every linear layer of the blocks
    assert all(part.adapters[0].b.grad.abs().max() > 0 for part in layers)


def test_seeds_draw_the_same_and_other_adapters() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        model = make_decoder()
        add_lora(model, LoraSettings(rank=4), seed)
        return {n: p for n, p in model.named_parameters() if n.endswith(".a")}

    first, same, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert len({round(float(p.abs().max()), 4) for p in first.values()}) > 10  # layer by layer


@pytest.mark.parametrize("kind", KINDS)
def test_merging_leaves_the_original_as_it_is(kind: str) -> None:
    model = make_decoder()
    plain = model(TOKENS)
    add_lora(model, LoraSettings(rank=4, kind=kind, targets=("q", "v", "down")), seed=3)
    scramble(model)
    wanted = model(TOKENS)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    result = merged(model)
    assert not any(isinstance(part, Adapted) for part in result.modules())
    assert {*dict(result.named_parameters())} == {*dict(make_decoder().named_parameters())}
    torch.testing.assert_close(result(TOKENS), wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=0)
    with without_adapters(model):
        torch.testing.assert_close(model(TOKENS), plain, rtol=0, atol=0)
    torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=0)
    assert merged(result) is result
    with pytest.raises(UserError, match="no adapter 'other'; it has default"):
        merged(model, "other")


def test_rows_of_one_batch_have_adapters_of_their_own() -> None:
    model = make_decoder()
    for seed, name in enumerate(("first", "second")):
        settings = (
            LoraSettings(rank=4, targets=("q", "up", "embedding")),
            LoraSettings(rank=2, kind="dora", targets=("q", "down")),
        )
        add_lora(model, settings[seed], seed, name)
        scramble(model, seed, name)
    assert adapter_names(model) == ["first", "second"]
    alone = {}
    names: list[str | None] = ["first", "second", None]
    for name in names:
        use_adapter(model, name)
        with torch.no_grad():
            alone[name] = model(TOKENS)
    names = ["second", None, "first"]
    switch = switch_of(model)
    assert switch is not None
    with torch.no_grad(), rows_with(switch, names):
        together = model(TOKENS)
    for row, name in enumerate(names):
        torch.testing.assert_close(together[row], alone[name][row], rtol=0, atol=2e-6)
    assert (switch.active, switch.rows) == (None, None)
    with pytest.raises(UserError, match="no adapter 'third'"):
        use_adapter(model, "third")


def test_dropout_acts_in_training_alone() -> None:
    model = make_decoder()
    add_lora(model, LoraSettings(rank=4, dropout=0.5), seed=3)
    scramble(model)
    assert torch.equal(model(TOKENS), model(TOKENS))
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))


def test_a_frozen_base_is_kept_in_the_precision_of_the_activations() -> None:
    model = make_decoder()
    model.compute_dtype = torch.bfloat16
    add_lora(model, LoraSettings(rank=4), seed=3)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["blocks.0.attention.q.base.weight"] == torch.bfloat16
    assert kinds["blocks.0.attention.q.adapters.0.a"] == torch.float32
    assert kinds["blocks.0.attention_norm.weight"] == torch.float32
    assert model.head.weight is model.embedding.weight
    assert all(p.dtype == torch.float32 for p in merged(model).parameters())


def test_heads_for_labels_stay_trained() -> None:
    config = ModelConfig(**{**SIZES, "causal": False, "pooler": True}, family="bert")  # type: ignore[arg-type]
    head = HeadConfig("classification", labels=("a", "b"))
    model = make_head(Encoder(config), head)
    add_lora(model, LoraSettings(rank=2), seed=0)
    assert {name for name in trained(model) if "adapters" not in name} == {"out.weight", "out.bias"}
    lm = make_head(Encoder(replace_pooler(config)), HeadConfig("masked_lm"))
    add_lora(lm, LoraSettings(rank=2), seed=0)
    assert all("adapters" in name for name in trained(lm))


def replace_pooler(config: ModelConfig) -> ModelConfig:
    from dataclasses import replace

    return replace(config, pooler=False)


def test_layers_are_chosen_by_the_ends_of_their_names() -> None:
    model = make_decoder()
    add_lora(model, LoraSettings(rank=2, targets=("attention.q", "1.feed_forward.down")), seed=0)
    places = [name for name, part in model.named_modules() if isinstance(part, Adapted)]
    assert places == ["blocks.0.attention.q", "blocks.1.attention.q",
                      "blocks.1.feed_forward.down", "blocks.2.attention.q"]  # fmt: skip
    with pytest.raises(UserError, match="'qq', which no layer of this model is called"):
        add_lora(make_decoder(), LoraSettings(rank=2, targets=("qq",)), seed=0)
    with pytest.raises(UserError, match="an embedding can have lora or rslora"):
        add_lora(make_decoder(), LoraSettings(rank=2, kind="dora", targets=("embedding",)), seed=0)
    pair = make_pair()
    with pytest.raises(UserError, match="one matrix with its output"):
        add_lora(pair, LoraSettings(rank=2, targets=("encoder.embedding",)), seed=0)


def make_pair() -> EncoderDecoder:
    side = ModelConfig(**{**SIZES, "causal": False})  # type: ignore[arg-type]
    from dataclasses import replace

    return EncoderDecoder(
        EncoderDecoderConfig(side, replace(side, causal=True, cross_attention=True), start_id=0)
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": -1}, "lora.rank is -1"), ({"kind": "loar"}, "Did you mean 'lora'"),
        ({"rank": 2, "dropout": 1.0}, "lora.dropout is 1.0"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha is 0"), ({"base": "nf4"}, "set lora.rank as well"),
        ({"rank": 2, "base": "int5"}, "lora.base is 'int5'"),
    ],
)  # fmt: skip
def test_wrong_settings(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        LoraSettings(**settings)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_a_layer_is_no_one_matrix_row_by_row() -> None:
    model = make_decoder()
    add_lora(model, LoraSettings(rank=4, targets=("q", "embedding")), 0)
    switch = switch_of(model)
    assert switch is not None
    with rows_with(switch, ["default", None]):
        for _, layer in adapted_layers(model):
            for ask in (lambda part: part.weight, lambda part: part.dequantize()):
                with pytest.raises(AssertionError, match="is no one matrix"):
                    ask(layer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (LoraSettings(rank=4, kind="dora", targets=("q", "embedding")), "DoRA stretches the rows"),
        (LoraSettings(rank=4, targets=("q", "querry")), "no layer of this model is called"),
    ],
)
def test_what_is_refused_changes_nothing(settings: LoraSettings, said: str) -> None:
    model = make_decoder()
    with pytest.raises(UserError, match=said):
        add_lora(model, settings, 0)
    assert not adapted_layers(model) and all(p.requires_grad for p in model.parameters())


def test_no_adapter_takes_the_place_of_another() -> None:
    model = make_decoder()
    add_lora(model, LoraSettings(rank=4), 0)
    scramble(model)
    before = model(TOKENS)
    with pytest.raises(UserError, match="has an adapter 'default' already"):
        add_lora(model, LoraSettings(rank=2), 1)
    assert torch.equal(model(TOKENS), before)


# --- a base in few bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["nf4", "int4", "int8"])
def test_a_base_in_few_bits(base: str) -> None:
    model = make_decoder()
    dense = model(TOKENS)
    packed = pack_base(model, base)
    assert packed.layers == 21 and packed.bytes_after < packed.bytes_before / 2
    assert (model(TOKENS) - dense).abs().mean() < 0.3 * dense.abs().mean()
    add_lora(model, LoraSettings(rank=4, kind="dora" if base == "int8" else "lora"), seed=1)
    scramble(model)
    with torch.no_grad():
        wanted = model(TOKENS)
    torch.testing.assert_close(merged(model)(TOKENS), wanted, rtol=0, atol=1e-4)
    assert sum(isinstance(part, QuantLinear) for part in model.modules()) == 21
    twin = copy.deepcopy(merged(model))  # the same, of plain numbers: gradients through a base
    loss = model(TOKENS).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert float(loss) == pytest.approx(float(twin(TOKENS).square().mean()), rel=1e-4)


def test_a_model_whose_layers_do_not_fit() -> None:
    model = make_decoder(d_model=36, head_dim=10, n_heads=4, d_ff=52)
    with pytest.raises(UserError, match="the inputs of none are a multiple of 64"):
        pack_base(model, "nf4")


# --- freezing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Freeze:
    blocks: int = 0
    embeddings: bool = False


def blocks_trained(model: nn.Module) -> list[bool]:
    stacks = [part.blocks for part in model.modules() if isinstance(part, Decoder | Encoder)]
    blocks = [block for stack in stacks for block in stack]
    return [all(p.requires_grad for p in block.parameters()) for block in blocks]


def test_freezing() -> None:
    model = make_decoder()
    freeze_layers(model, Freeze(2))
    assert blocks_trained(model) == [False, False, True] and model.embedding.weight.requires_grad
    model = make_decoder()
    freeze_layers(model, Freeze(-1, embeddings=True))
    assert blocks_trained(model) == [False, False, True]
    assert not model.embedding.weight.requires_grad and model.final_norm.weight.requires_grad
    model(TOKENS).sum().backward()
    assert model.get_parameter("blocks.0.attention.q.weight").grad is None
    pair = make_pair()
    freeze_layers(pair, Freeze(3))
    assert blocks_trained(pair) == [False] * 3 + [True] * 3
    for wrong in (4, -4):
        with pytest.raises(UserError, match="the model has 3 blocks; give a number from -3 to 3"):
            freeze_layers(make_decoder(), Freeze(wrong))
