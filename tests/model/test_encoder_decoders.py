"""Encoder-decoders equal the reference library in fp32, folders in both directions."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.train.losses import IGNORED
from llm_from_scratch.train.seq2seq import Seq2Seq, Seq2SeqBatch
from llm_from_scratch.weights.families import FAMILIES, family_of, read_config
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.layouts import put_together
from tests.model.references_seq2seq import (
    SEQ2SEQ,
    SEQ2SEQ_VARIANTS,
    make_seq2seq,
    seq2seq_classes,
)
from tests.model.test_model_parity import assert_close, assert_same_states, outputs_of

Pair = tuple[PreTrainedModel, EncoderDecoder]


def as_ours(theirs: PreTrainedModel, folder: Path) -> EncoderDecoder:
    theirs.save_pretrained(folder)
    ours, _ = load_folder(folder)
    assert isinstance(ours, EncoderDecoder)
    return ours


@pytest.fixture(scope="module", params=list(SEQ2SEQ))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A reference model and ours, loaded from the folder that the reference wrote."""
    theirs = make_seq2seq(request.param)
    return theirs, as_ours(theirs, tmp_path_factory.mktemp(request.param))


def texts(model: EncoderDecoder, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources of 40 tokens, past every exact distance, and targets of 30."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(0, model.config.encoder.vocab_size, (batch, 40), generator=generator)
    target = torch.randint(0, model.config.vocab_size, (batch, 30), generator=generator)
    return source, target


def mask_of(lengths: tuple[int, ...], width: int, side: str = "right") -> torch.Tensor:
    """1 for text, 0 for the padding on this side of it."""
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if side == "left" else mask


def assert_same_logits(theirs: PreTrainedModel, ours: EncoderDecoder) -> None:
    source, target = texts(ours)
    with torch.no_grad():
        wanted = theirs(input_ids=source, decoder_input_ids=target).logits
        assert_close(ours(source, target), wanted)


def test_logits_of_their_folder(both: Pair) -> None:
    assert_same_logits(*both)


def test_logits_of_our_folder(both: Pair, tmp_path: Path) -> None:
    _, ours = both
    save_folder(ours, None, tmp_path / "model")
    back, info = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_logits(back.eval(), ours)
    # What the reference read from our config.json says the same to us.
    assert as_ours(back, tmp_path / "again").config == ours.config


def test_hidden_states(both: Pair) -> None:
    theirs, ours = both
    source, target = texts(ours)
    with (
        torch.no_grad(),
        outputs_of(ours.encoder.blocks) as reading,
        outputs_of(ours.decoder.blocks) as writing,
    ):
        encoded = ours.encoder(source)
        last = ours.hidden(target, encoded)
        wanted = theirs(input_ids=source, decoder_input_ids=target, output_hidden_states=True)
    assert_close(encoded, wanted.encoder_last_hidden_state)
    assert_same_states(reading, encoded, wanted.encoder_hidden_states)
    assert_same_states(writing, last, wanted.decoder_hidden_states)


def assert_same_padded(both: Pair, mask: torch.Tensor, target_mask: torch.Tensor) -> None:
    """Every block's states of both stacks, and the logits, of text among padding."""
    theirs, ours = both
    source, target = texts(ours, batch=3)
    with (
        torch.no_grad(),
        outputs_of(ours.encoder.blocks) as reading,
        outputs_of(ours.decoder.blocks) as writing,
    ):
        wanted = theirs(
            input_ids=source,
            attention_mask=mask,
            decoder_input_ids=target,
            decoder_attention_mask=target_mask,
            output_hidden_states=True,
        )
        encoded = ours.encoder(source, attention_mask=mask)
        last = ours.hidden(target, encoded, attention_mask=mask, target_mask=target_mask)
    seen = target_mask.bool()
    assert_same_states(reading, encoded, wanted.encoder_hidden_states, mask.bool())
    assert_same_states(writing, last, wanted.decoder_hidden_states, seen)
    assert_close(ours.logits(last)[seen], wanted.logits[seen])


def test_padding_of_sources_and_targets(both: Pair) -> None:
    _, ours = both
    source, target = texts(ours, batch=3)
    mask, target_mask = mask_of((40, 23, 5), 40), mask_of((7, 30, 16), 30)
    assert_same_padded(both, mask, target_mask)
    with torch.no_grad():
        got = ours(source, target, attention_mask=mask, target_mask=target_mask)
        # The target's mask changes nothing for text, which does not see the padding behind it.
        without = ours(source, target, attention_mask=mask)
        alone = [ours(source[i : i + 1, :n], target[i : i + 1]) for i, n in enumerate((40, 23, 5))]
    seen = target_mask.bool()
    assert_close(without[seen], got[seen])
    assert_close(torch.cat(alone), without)


def test_padding_on_the_left(both: Pair) -> None:
    """Text is what it is alone. The reference finds the same where positions are distances."""
    theirs, ours = both
    source, target = texts(ours, batch=3)
    lengths, target_lengths = (40, 23, 5), (7, 30, 16)
    mask = mask_of(lengths, 40, "left")
    target_mask = mask_of(target_lengths, 30, "left")
    if theirs.config.model_type in ("t5", "mt5"):
        assert_same_padded(both, mask, target_mask)
    with torch.no_grad():
        got = ours(source, target, attention_mask=mask, target_mask=target_mask)
        for row, (s, t) in enumerate(zip(lengths, target_lengths, strict=True)):
            wanted = theirs(
                input_ids=source[row : row + 1, -s:], decoder_input_ids=target[row : row + 1, -t:]
            ).logits
            assert_close(got[row : row + 1, -t:], wanted)


@pytest.mark.parametrize("steps", [[1] * 30, [11, 1, 9, 1, 8]], ids=["one by one", "chunks"])
def test_through_the_cache(both: Pair, steps: list[int]) -> None:
    """The source goes in once; its keys stay in the cache."""
    theirs, ours = both
    source, target = texts(ours)
    mask = mask_of((40, 17), 40)
    cache = KVCache(ours.config.decoder, batch=2, capacity=30)
    first, *rest = target.split(steps, 1)
    with torch.no_grad(), outputs_of(ours.decoder.blocks) as found:
        wanted = theirs(
            input_ids=source,
            attention_mask=mask,
            decoder_input_ids=target,
            output_hidden_states=True,
        )
        encoded = ours.encoder(source, attention_mask=mask)
        parts = [ours.hidden(first, encoded, attention_mask=mask, cache=cache)]
        parts += [ours.hidden(part, cache=cache) for part in rest]
        assert_close(ours.logits(torch.cat(parts, 1)), wanted.logits)
    assert_same_states(found, torch.cat(parts, 1), wanted.decoder_hidden_states)


def test_rows_that_differ_and_leave(both: Pair) -> None:
    """A padded beginning of the target, then rows at different places, one of which goes."""
    theirs, ours = both
    source, target = texts(ours, batch=3)
    mask, lengths = mask_of((40, 17, 3), 40), torch.tensor([9, 4, 13])
    cache = KVCache(ours.config.decoder, batch=3, capacity=30)
    rows = torch.arange(3)
    with torch.no_grad():
        wanted = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
        encoded = ours.encoder(source, attention_mask=mask)
        ours.hidden(target[:, :13], encoded, attention_mask=mask, cache=cache)
        cache.set_lengths(lengths)
        for step in range(15):
            if step == 6:
                cache.select(torch.tensor([0, 2]))
                rows, lengths = rows[[0, 2]], lengths[[0, 2]]
            here = lengths + step
            got = ours.logits(ours.hidden(target[rows, here][:, None], cache=cache))
            assert_close(got[:, 0], wanted[rows, here])


def test_loss_and_gradients(both: Pair) -> None:
    theirs, ours = both
    source, target = texts(ours, batch=3)
    mask = mask_of((40, 23, 5), 40)
    labels = target.masked_fill(mask_of((30, 12, 7), 30) == 0, IGNORED)
    theirs.zero_grad()
    ours.zero_grad()
    theirs.config.pad_token_id = 0  # which stands behind a text's end, where nobody sees it
    wanted_loss = theirs(input_ids=source, attention_mask=mask, labels=labels).loss
    wanted_loss.backward()
    result = Seq2Seq().step(ours, Seq2SeqBatch(source, mask, labels))
    (result.loss_sum / result.count).backward()
    torch.testing.assert_close(result.loss_sum / result.count, wanted_loss, rtol=1e-5, atol=0)
    family = FAMILIES[theirs.config.model_type]
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    entries = list(family.entries(ours.config, gradients))
    assert {entry.theirs for entry in entries} == set(wanted)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for entry in entries:
        got = put_together(entry, [gradients[name] for name in entry.ours], 1)  # type: ignore[misc]
        # Sums over all positions cancel: errors are of the size of the summands.
        scale = wanted[entry.theirs].abs().max() + 1e-3 * largest
        torch.testing.assert_close(got / scale, wanted[entry.theirs] / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "changes"), SEQ2SEQ_VARIANTS)
def test_other_values_of_the_fields(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = make_seq2seq(family, **changes)
    ours = as_ours(theirs, tmp_path / "theirs")
    assert_same_logits(theirs, ours)
    save_folder(ours, None, tmp_path / "ours")
    assert_same_logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval(), ours)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_every_field_of_the_reference_is_known(family: str) -> None:
    """A field that a new version adds is noticed: handle, require or list it, and set it here."""
    table = FAMILIES[family]
    config = make_seq2seq(family).config
    assert set(config.to_dict()) - table.known() == set()
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(config)} - inherited
    assert own <= set(SEQ2SEQ[family][2])
    assert all(reason for reason in table.unused.values())


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_left_out_fields_have_the_defaults_of_the_class(family: str) -> None:
    theirs = json.loads(seq2seq_classes(family)[0]().to_json_string(use_diff=False))
    for field, value in FAMILIES[family].defaults.items():
        if value is not None and field in theirs:
            assert value == theirs[field], field


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_config_comes_back_from_what_is_written(family: str) -> None:
    table, config = read_config(make_seq2seq(family).config.to_dict(), "config.json")
    assert isinstance(config, EncoderDecoderConfig)
    assert config.family == table.name == family_of(config).name == family
    assert config.encoder.n_layers == 3 and config.decoder.n_layers == 2


def own_head(folder: Path) -> torch.Tensor:
    """Give a T5's folder a head that is not its embedding."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors["lm_head.weight"]


@pytest.mark.parametrize("family", ["t5", "mt5"])
@pytest.mark.parametrize("said", [True, False, None])
def test_a_t5_has_the_head_that_is_stored(family: str, said: bool | None, tmp_path: Path) -> None:
    """Flan-T5 and mT5 have a head of their own; version 5 writes "tied" into their config."""
    make_seq2seq(family).save_pretrained(tmp_path)
    head = own_head(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["tie_word_embeddings"]
    values.pop("scale_decoder_outputs", None)
    if said is not None:
        values["tie_word_embeddings"] = said
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    ours, _ = load_folder(tmp_path)
    assert isinstance(ours, EncoderDecoder)
    assert torch.equal(ours.decoder.head.weight, head)
    assert ours.config.decoder.scale_logits == (family == "t5" and said is not False)
    assert_same_logits(theirs, ours)
    save_folder(ours, None, tmp_path / "ours")
    back = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert_same_logits(back, ours)


def test_copies_of_the_embedding_are_taken_for_what_they_are(tmp_path: Path) -> None:
    """Older folders hold the shared matrix four times, and Marian's sinusoids."""
    theirs = make_seq2seq("marian", share_encoder_decoder_embeddings=True, decoder_vocab_size=71)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    shared = tensors["model.shared.weight"]
    for name in ("lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"):
        tensors[f"{name}.weight"] = shared.clone()
    for side in ("encoder", "decoder"):
        tensors[f"model.{side}.embed_positions.weight"] = torch.zeros(48, 40)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, _ = load_folder(tmp_path)
    assert_same_logits(theirs, ours)  # type: ignore[arg-type]
    tensors["model.decoder.embed_tokens.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.decoder\.embed_tokens\.weight"):
        load_folder(tmp_path)


def test_a_bart_without_the_bias_has_zeros(tmp_path: Path) -> None:
    """Folders of the bare model lack it, and the prefix of all names."""
    theirs = make_seq2seq("bart")
    theirs.model.save_pretrained(tmp_path)
    theirs.final_logits_bias.zero_()
    ours, _ = load_folder(tmp_path)
    assert_same_logits(theirs, ours)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("t5", {"feed_forward_proj": "gated"}, "feed_forward_proj"),
        ("t5", {"feed_forward_proj": 7}, "feed_forward_proj"),
        ("t5", {"relative_attention_num_buckets": 2}, "relative_buckets"),
        ("t5", {"relative_attention_max_distance": 5}, "relative_distance"),
        ("t5", {"decoder_start_token_id": 71}, "start_id"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder"),
        ("mt5", {"decoder_start_token_id": -1}, "decoder_start_token_id"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("bart", {"normalize_before": True}, "normalize_before"),
        ("bart", {"decoder_attention_heads": 7}, "decoder_attention_heads"),
        ("bart", {"is_decoder": True}, "is_decoder"),
        ("bart", {"forced_eos_token_id": "end"}, "forced_eos_token_id"),
        ("marian", {"static_position_embeddings": False}, "static_position_embeddings"),
        ("marian", {"share_encoder_decoder_embeddings": True}, "vocab_size"),
        (
            "marian",
            {"share_encoder_decoder_embeddings": True, "tie_word_embeddings": False},
            "tie_word_embeddings",
        ),
        ("marian", {"state_size": 16}, "state_size"),
    ],
)
def test_what_cannot_be_expressed_is_named(
    family: str, changes: dict[str, Any], named: str
) -> None:
    values = make_seq2seq(family).config.to_dict()
    with pytest.raises(UserError, match=rf"^config\.json.*{named}"):
        read_config({**values, **changes}, "config.json")


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_any_wrong_value_is_a_sentence(family: str) -> None:
    values = make_seq2seq(family).config.to_dict()
    for name in values:
        for wrong in (None, [], {}, [[1]], "x", -1, 0, 2.5, True, 10**9, float("nan")):
            try:
                read_config({**values, name: wrong}, "config.json")
            except UserError as error:
                assert str(error).startswith("config.json"), (name, wrong)
