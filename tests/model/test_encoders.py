"""Encoders equal the reference library in fp32: every family, folders in both directions."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.weights.families import FAMILIES, family_of, read_config
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.layouts import put_together
from tests.model.references import SLIDE
from tests.model.references_encoders import (
    ENCODERS,
    VARIANTS,
    make_encoder,
    padded,
    random_text,
)
from tests.model.test_model_parity import assert_close, outputs_of
from tests.model.test_model_parity import assert_same_states as assert_every_block

Pair = tuple[PreTrainedModel, Encoder]
WITH_POOLER = ("bert", "roberta", "xlm-roberta", "mpnet")
ABSOLUTE = ("bert", "distilbert")  # positions that count the padding too, unless they are given


@pytest.fixture(scope="module", params=list(ENCODERS))
def encoders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A reference encoder and ours, loaded from the folder that the reference wrote."""
    theirs = make_encoder(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    ours, _ = load_folder(folder)
    assert isinstance(ours, Encoder)
    return theirs, ours


def assert_same_states(theirs: PreTrainedModel, ours: Encoder, length: int = 40) -> None:
    tokens = random_text(ours.config.vocab_size, 2, length)
    with torch.no_grad():
        wanted = theirs(tokens)
        assert_close(ours(tokens), wanted.last_hidden_state)
        if ours.config.pooler:
            assert_close(ours.pooled(ours(tokens)), wanted.pooler_output)


def load_theirs(folder: Path, **options: Any) -> PreTrainedModel:
    back, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return back.eval()


def test_states_of_their_folder(encoders: Pair) -> None:
    theirs, ours = encoders
    assert ours.config.pooler == (theirs.config.model_type in WITH_POOLER)
    assert_same_states(theirs, ours)


def test_states_of_our_folder(encoders: Pair, tmp_path: Path) -> None:
    theirs, ours = encoders
    save_folder(ours, None, tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert not [name for name in names if name.startswith(FAMILIES[ours.config.family].prefix)]
    back = load_theirs(tmp_path / "model")
    assert type(back) is type(theirs)
    assert_same_states(back, ours)
    back.save_pretrained(tmp_path / "again")
    again, _ = load_folder(tmp_path / "again")
    assert again.config == ours.config


def test_hidden_states(encoders: Pair) -> None:
    theirs, ours = encoders
    tokens = random_text(ours.config.vocab_size, 2, 40)
    with torch.no_grad(), outputs_of(ours.blocks) as found:
        last = ours(tokens)
        wanted = theirs(tokens, output_hidden_states=True).hidden_states
    assert_every_block(found, last, wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(encoders: Pair, side: str) -> None:
    """On the left too, where the reference knows the positions or is told them."""
    theirs, ours = encoders
    text = random_text(ours.config.vocab_size, 4, 40)
    tokens, mask = padded(text, theirs.config.pad_token_id, side)
    told = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad(), outputs_of(ours.blocks) as found:
        wanted = theirs(
            tokens,
            attention_mask=mask,
            output_hidden_states=True,
            **(told if theirs.config.model_type in ABSOLUTE and side == "left" else {}),
        )
        got = ours(tokens, attention_mask=mask)
    assert_every_block(found, got, wanted.hidden_states, mask.bool())
    assert_close(got[mask.bool()], wanted.last_hidden_state[mask.bool()])
    if ours.config.pooler and side == "right":
        assert_close(ours.pooled(got, mask), wanted.pooler_output)
    # What stands in the padding does not matter.
    other = torch.where(mask.bool(), tokens, 6)
    with torch.no_grad():
        assert_close(ours(other, attention_mask=mask)[mask.bool()], got[mask.bool()])
        alone = ours(text[1:2, mask[1].bool()])
    assert_close(got[1, mask[1].bool()], alone[0])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_segments(family: str, tmp_path: Path) -> None:
    theirs = make_encoder(family)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    tokens = random_text(67, 2, 30)
    segments = (torch.arange(30) >= torch.tensor([[11], [17]])).long() * 2
    with torch.no_grad():
        wanted = theirs(tokens, token_type_ids=segments).last_hidden_state
        assert_close(ours(tokens, segments_bt=segments), wanted)
        assert (ours(tokens) - wanted).abs().max() > 0.1


def test_the_longest_text_and_one_more(encoders: Pair) -> None:
    theirs, ours = encoders
    longest = ours.config.max_seq_len
    assert_same_states(theirs, ours, longest)
    with pytest.raises(UserError, match=f"{longest + 1} tokens were given"):
        ours(random_text(67, 1, longest + 1))


def test_windows_look_both_ways(tmp_path: Path) -> None:
    """`local_attention` counts both sides: half of it is how far a token sees."""
    theirs = make_encoder("modernbert", local_attention=6, layer_types=[SLIDE] * 4)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    assert isinstance(ours, Encoder)
    assert ours.config.window == 3 and ours.config.window_layers == (0, 1, 2, 3)
    one = Encoder(replace(ours.config, n_layers=1, window_layers=(0,))).eval()
    one.load_state_dict(ours.state_dict(), strict=False)
    tokens = random_text(67, 1, 20)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 67
    with torch.no_grad():
        moved = (one(tokens) - one(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(7, 14))


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_gradients(encoders: Pair, side: str) -> None:
    theirs, ours = encoders
    tokens, mask = padded(random_text(67, 3, 40), theirs.config.pad_token_id, side)
    if side == "none":
        tokens, mask = random_text(67, 3, 40), torch.ones_like(mask)
    told = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    told = told if theirs.config.model_type in ABSOLUTE and side == "left" else {}
    target = torch.randn(3, 40, ours.config.d_model, generator=torch.Generator().manual_seed(3))

    def loss(states: torch.Tensor) -> torch.Tensor:
        return ((states - target)[mask.bool()] ** 2).mean()

    theirs.zero_grad()
    ours.zero_grad()
    loss(theirs(tokens, attention_mask=mask, **told).last_hidden_state).backward()
    loss(ours(tokens, attention_mask=mask)).backward()
    family = FAMILIES[ours.config.family]
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    wanted = {
        family.prefix + name: p.grad for name, p in theirs.named_parameters() if p.grad is not None
    }
    entries = list(family.entries(ours.config, gradients))
    assert {entry.theirs for entry in entries} == set(wanted)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for entry in entries:
        parts = [gradients[name] for name in entry.ours]
        got = put_together(entry, parts, ours.config.n_heads)
        scale = wanted[entry.theirs].abs().max() + 1e-3 * largest
        torch.testing.assert_close(got / scale, wanted[entry.theirs] / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_other_values_of_the_fields(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = make_encoder(family, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_folder(tmp_path / "theirs")
    assert isinstance(ours, Encoder)
    assert_same_states(theirs, ours)
    save_folder(ours, None, tmp_path / "ours")
    assert_same_states(load_theirs(tmp_path / "ours"), ours)


@pytest.mark.parametrize("family", WITH_POOLER)
def test_a_base_model_without_its_pooler(family: str, tmp_path: Path) -> None:
    theirs = make_encoder(family, options={"add_pooling_layer": False})
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_folder(tmp_path / "theirs")
    assert isinstance(ours, Encoder) and not ours.config.pooler
    assert family_of(ours.config) is FAMILIES[family]
    save_folder(ours, None, tmp_path / "ours")
    assert_same_states(load_theirs(tmp_path / "ours", add_pooling_layer=False), ours)


def test_a_pooler_needs_a_family_that_has_one(tmp_path: Path) -> None:
    make_encoder("distilbert").save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    assert isinstance(ours, Encoder)
    ours.add_pooler(seed=1)
    with pytest.raises(UserError, match="No Hugging Face class can express"):
        family_of(ours.config)


@pytest.mark.parametrize("family", ENCODERS)
def test_backbone_of_a_folder_with_a_head(family: str, tmp_path: Path) -> None:
    """Behind the prefix, beside a head's tensors and buffers that older versions stored."""
    theirs = make_encoder(family, "masked_lm")
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith(FAMILIES[family].prefix) for name in stored)
    stored[f"{FAMILIES[family].prefix}embeddings.position_ids"] = torch.arange(50)[None]
    if family != "modernbert":
        save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    ours, _ = load_folder(tmp_path, head="none")
    assert isinstance(ours, Encoder)
    assert_same_states(theirs.base_model, ours)


def test_names_of_the_first_berts(tmp_path: Path) -> None:
    theirs = make_encoder("bert", "masked_lm")
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in stored.items()
    }
    assert any(name.endswith("gamma") for name in old)
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    ours, _ = load_folder(tmp_path, head="none")
    assert isinstance(ours, Encoder)
    assert_same_states(theirs.base_model, ours)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_field_of_the_reference_is_known(family: str) -> None:
    """A field that a new version adds is noticed: handle, require or list it, and set it here."""
    table = FAMILIES[family]
    config = make_encoder(family).config
    assert set(config.to_dict()) - table.known() == set()
    own = {field.name for field in fields(config)} - {f.name for f in fields(PreTrainedConfig)}
    assert own <= set(ENCODERS[family][1])
    assert all(reason for reason in table.unused.values())


@pytest.mark.parametrize("family", ENCODERS)
def test_left_out_fields_have_the_defaults_of_the_class(family: str) -> None:
    theirs = json.loads(type(make_encoder(family).config)().to_json_string(use_diff=False))
    table = FAMILIES[family]
    heads = {k: v for head in table.heads.values() for k, v in head.defaults.items()}
    for field, value in {**table.defaults, **heads}.items():
        if value is not None and field in theirs:
            assert value == theirs[field], field


@pytest.mark.parametrize("family", ENCODERS)
def test_what_is_not_known_is_refused_by_name(family: str) -> None:
    values = make_encoder(family).config.to_dict()
    with pytest.raises(UserError, match="the field 'state_size'"):
        read_config({**values, "state_size": 16}, "config.json")
    with pytest.raises(UserError, match="'is_decoder' is True; it must be False"):
        read_config({**values, "is_decoder": True}, "config.json")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "'position_embedding_type'"),
        ("roberta", {"pad_token_id": None}, "'pad_token_id' is None; it must be a token's id"),
        ("roberta", {"max_position_embeddings": 3}, "it must be above 4, where the positions"),
        ("mpnet", {"relative_attention_num_buckets": 16}, "it must be 32"),
        ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'rope_scaling'"),
        ("modernbert", {"norm_bias": "no"}, "'norm_bias' is 'no'; it must be one of False, True"),
    ],
)
def test_values_that_mean_another_model(family: str, changes: dict[str, Any], message: str) -> None:
    values = make_encoder(family).config.to_dict()
    with pytest.raises(UserError, match=message):
        read_config({**values, **changes}, "config.json")


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_bfloat16_folder_keeps_its_precision(family: str, tmp_path: Path) -> None:
    theirs = make_encoder(family).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    wide, _ = load_folder(tmp_path, dtype=torch.float32)
    assert isinstance(wide, Encoder)
    assert_same_states(AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval(), wide)
    tokens, mask = padded(random_text(67, 3, 40), 1)
    with torch.no_grad():
        exact = wide(tokens, attention_mask=mask)[mask.bool()]
        rounded = ours(tokens, attention_mask=mask)[mask.bool()]
        reference = theirs(tokens, attention_mask=mask).last_hidden_state[mask.bool()]
    assert rounded.dtype == torch.bfloat16
    # As far from the exact value as the reference in the same precision.
    assert (rounded - exact).std() < 1.5 * (reference - exact).std()


def test_an_encoder_is_no_decoder(encoders: Pair) -> None:
    _, ours = encoders
    assert not isinstance(ours, Decoder) and not ours.config.causal
    tokens = random_text(67, 1, 12)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 67
    with torch.no_grad():
        assert (ours(tokens) - ours(changed)).abs().amax(-1).min() > 1e-5  # all see the last one


def test_training_mode_drops(encoders: Pair) -> None:
    _, ours = encoders
    tokens = random_text(67, 1, 12)
    ours.train()
    torch.manual_seed(1)
    with torch.no_grad():
        first, second = ours(tokens), ours(tokens)
    ours.eval()
    assert not torch.equal(first, second)
