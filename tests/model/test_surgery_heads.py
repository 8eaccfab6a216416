"""Surgery on models under a head and on encoder-decoders, against the reference library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.heads import Embedder, Head, MaskedLM
from llm_from_scratch.model.surgery import (
    add_tokens,
    drop_layers,
    extend_context,
    grow_vocabulary,
    on_side,
    tie,
    untie,
)
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.weights.folder import load_folder, save_folder
from tests.model.references import make_reference
from tests.model.references_encoders import make_encoder, random_text
from tests.model.references_heads import head_class, make_headed
from tests.model.references_seq2seq import make_seq2seq, seq2seq_classes
from tests.model.test_model_parity import assert_close

# A tied and an untied masked language model, and classifiers on each kind of backbone.
HEADED: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "masked_lm", {}),
    ("bert", "masked_lm", {"tie_word_embeddings": False}),
    ("modernbert", "masked_lm", {}),
    ("roberta", "classification", {}),
    ("bert", "multiple_choice", {}),
    ("gpt2", "classification", {}),
    ("llama", "classification", {}),
    ("bart", "classification", {}),
    ("t5", "classification", {"tie_word_embeddings": False}),
    ("t5", "token_classification", {}),
]


def as_ours(theirs: PreTrainedModel, folder: Path, head: str | None = None) -> Any:
    theirs.save_pretrained(folder)
    return load_folder(folder, head=head)[0]


def answers(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, Tensor) else found.logits


def assert_theirs_agrees(model: Head, kind: str, folder: Path, tokens: Tensor) -> None:
    """The reference loads what is saved, completely, and its answers are ours."""
    save_folder(model, None, folder)
    their_class = head_class(model.config.family, kind)
    theirs, info = their_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"]
    theirs.config.eos_token_id = 2  # which a tokenizer would bring
    assert_close(answers(theirs.eval(), tokens), answers(model, tokens))


def texts(kind: str, length: int = 20) -> Tensor:
    """Texts of ids that every model has; a pair's source ends itself."""
    tokens = random_text(67, *((2, 3) if kind == "multiple_choice" else (3,)), length)
    tokens[..., -1] = 2
    return tokens


@pytest.mark.parametrize(("family", "kind", "changes"), HEADED)
def test_a_vocabulary_grows_under_a_head(
    family: str, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    old = as_ours(make_headed(family, kind, **changes), tmp_path / "theirs")
    v, tokens = old.config.vocab_size, texts(kind)
    before = answers(old, tokens)
    new = grow_vocabulary(old, v, v + 6)
    assert type(new) is type(old) and new.config.vocab_size == v + 6
    assert new.head_config == old.head_config and not new.training
    after = answers(new, tokens)
    if not isinstance(new, MaskedLM):
        assert torch.equal(after, before)
    else:
        assert_close(after[..., :v], before)
        mean = before.mean(-1, keepdim=True).expand(*before.shape[:-1], 6)
        torch.testing.assert_close(after[..., v:], mean, atol=1e-5, rtol=1e-5)
        tied = new.out.weight is new.backbone.embedding.weight  # type: ignore[union-attr]
        assert tied == changes.get("tie_word_embeddings", True)
    tokens[..., 3] = v + 4
    assert_theirs_agrees(new, kind, tmp_path / "ours", tokens)
    mine = {id(p) for p in new.parameters()}
    assert not mine & {id(p) for p in old.parameters()}


@pytest.mark.parametrize("kind", ["masked_lm", "classification"])
def test_tokens_added_under_a_head(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat. " * 40], vocab_size=270)
    v = tokenizer.vocab_size
    old = as_ours(make_headed("bert", kind, vocab_size=v), tmp_path / "theirs")
    new, grown = add_tokens(old, tokenizer, ["<|user|>", "<|end|>"], special=True)
    assert new.config.vocab_size == grown.vocab_size == v + 2
    tokens = torch.tensor([grown.encode("<|user|>the cat sat<|end|>", special=True)])
    assert tokens[0, 0] == v and tokens[0, -1] == v + 1
    assert_theirs_agrees(new, kind, tmp_path / "ours", tokens)
    assert_close(answers(new, tokens[:, 1:-1])[..., :v], answers(old, tokens[:, 1:-1]))
    save_folder(new, grown, tmp_path / "ours")
    again, tokenizer_again = load_folder(tmp_path / "ours")
    assert tokenizer_again is not None and isinstance(again, type(old))
    assert tokenizer_again.encode("<|end|>", special=True) == [v + 1]


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "masked_lm"), ("roberta", "classification"), ("modernbert", "token_classification"),
     ("llama", "classification"), ("bart", "classification")],
)  # fmt: skip
def test_a_longer_context_under_a_head(family: str, kind: str, tmp_path: Path) -> None:
    old = as_ours(make_headed(family, kind), tmp_path / "theirs")
    length = old.config.max_seq_len
    new = extend_context(old, length + 30)
    assert new.config.max_seq_len == length + 30
    assert_theirs_agrees(new, kind, tmp_path / "ours", texts(kind, length + 30))
    if family in ("bert", "roberta", "bart"):
        same = extend_context(old, length + 30, "repeat")
        assert torch.equal(answers(same, texts(kind)), answers(old, texts(kind)))


@pytest.mark.parametrize(("family", "kind"), [("bert", "masked_lm"), ("gpt2", "classification")])
def test_fewer_layers_under_a_head(family: str, kind: str, tmp_path: Path) -> None:
    old = as_ours(make_headed(family, kind), tmp_path / "theirs")
    new = drop_layers(old, [0, 2])
    before, after = old.state_dict(), new.state_dict()
    assert {name.replace("blocks.2.", "blocks.1.") for name in before} == {*after}
    for name, value in after.items():
        assert torch.equal(value, before[name.replace("blocks.1.", "blocks.2.")])
    assert_theirs_agrees(new, kind, tmp_path / "ours", texts(kind))


def test_an_embedder_takes_longer_texts_and_frozen_stays_frozen(tmp_path: Path) -> None:
    old = as_ours(make_encoder("bert"), tmp_path / "theirs", head="embedding")
    old.head_config = dataclasses.replace(old.head_config, max_length=32)
    old.backbone.embedding.weight.requires_grad_(False)
    for new, longest in ((grow_vocabulary(old, 67, 70), 32), (extend_context(old, 99), 99)):
        assert isinstance(new, Embedder)
        assert new.head_config.max_length == longest
        frozen = [name for name, p in new.named_parameters() if not p.requires_grad]
        assert frozen == ["backbone.embedding.weight"]
    assert_close(answers(grow_vocabulary(old, 67, 70), texts("")), answers(old, texts("")))


def test_where_the_head_took_the_decoder_away(tmp_path: Path) -> None:
    old = as_ours(make_headed("t5", "token_classification"), tmp_path / "theirs")
    tokens = texts("")
    longer = extend_context(old, 20_000)
    assert longer.config.encoder.max_seq_len == longer.config.decoder.max_seq_len == 20_000
    assert torch.equal(answers(longer, tokens), answers(old, tokens))
    smaller = on_side(old, "encoder", lambda stack: drop_layers(stack, [0, 2]))
    assert (smaller.config.encoder.n_layers, smaller.config.decoder.n_layers) == (2, 2)
    assert_theirs_agrees(smaller, "token_classification", tmp_path / "ours", tokens)
    with pytest.raises(UserError, match="say which one loses layers"):
        drop_layers(old, [0])
    with pytest.raises(UserError, match="has no sides"):
        on_side(as_ours(make_headed("gpt2", "classification"), tmp_path / "gpt2"), "encoder", tie)


# --- encoder-decoders ----------------------------------------------------------------------------


def logits(model: Any) -> Tensor:
    """Of a source and a target."""
    source, target = texts("")[:, :15], random_text(67, 3, 9, seed=1)
    with torch.no_grad():
        if isinstance(model, PreTrainedModel):
            return model(input_ids=source, decoder_input_ids=target).logits
        return model(source, target)


def assert_their_pair_agrees(model: Any, folder: Path) -> None:
    save_folder(model, None, folder)
    their_class = seq2seq_classes(model.config.family)[1]
    theirs, info = their_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert_close(logits(theirs.eval()), logits(model))
    assert load_folder(folder)[0].config == model.config


@pytest.mark.parametrize("family", ["t5", "mt5", "marian"])
def test_an_encoder_decoder_untied_and_tied_again(family: str, tmp_path: Path) -> None:
    old = as_ours(make_seq2seq(family), tmp_path / "theirs")
    apart = untie(old)
    assert torch.equal(logits(apart), logits(old))
    assert apart.decoder.head.weight is not apart.decoder.embedding.weight
    for keep in ("embedding", "head", "mean"):
        assert torch.equal(logits(tie(apart, keep)), logits(old))
    with torch.no_grad():
        apart.decoder.head.weight.mul_(0.5)
    assert_their_pair_agrees(apart, tmp_path / "apart")
    again = tie(apart, "head")
    assert again.decoder.head.weight is again.decoder.embedding.weight
    torch.testing.assert_close(again.decoder.embedding.weight, apart.decoder.head.weight)
    shared = family != "marian"
    assert (again.encoder.embedding.weight is again.decoder.embedding.weight) == shared
    assert_their_pair_agrees(again, tmp_path / "again")


def test_a_flan_t5_is_tied_and_grown(tmp_path: Path) -> None:
    theirs = make_seq2seq("t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    old = untie(as_ours(theirs, tmp_path / "theirs"))  # which the class ties while it is random
    with torch.no_grad():
        old.decoder.head.weight.mul_(0.5).add_(0.1)
    assert not old.config.decoder.scale_logits
    assert_their_pair_agrees(tie(old), tmp_path / "tied")
    new = grow_vocabulary(old, 71, 75)
    assert_close(logits(new)[..., :71], logits(old))
    assert_their_pair_agrees(new, tmp_path / "grown")


def test_what_cannot_be_done_to_an_encoder_decoder_is_said(tmp_path: Path) -> None:
    marian = as_ours(make_seq2seq("marian"), tmp_path / "marian")
    with pytest.raises(UserError, match=r"has 71 entries and the target's 67; only one that both"):
        grow_vocabulary(marian, 67, 75)
    bart = as_ours(make_seq2seq("bart"), tmp_path / "bart")
    with pytest.raises(UserError, match="without an output matrix of its own; leave it tied"):
        untie(bart)
    for change in (tie, untie):
        for model in (bart.encoder, as_ours(make_headed("bert", "masked_lm"), tmp_path / "bert")):
            with pytest.raises(UserError, match="is for a Decoder or an EncoderDecoder, not for a"):
                change(model)


def test_absurd_sizes_are_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    gpt2 = as_ours(make_reference("gpt2"), tmp_path / "gpt2")
    most = r"1,000,000,000,000 long; there may be 16,777,216 at most"
    with pytest.raises(UserError, match=f"The vocabulary would be {most}"):
        grow_vocabulary(gpt2, 67, 10**12)
    with pytest.raises(UserError, match=f"The context would be {most}"):
        extend_context(gpt2, 10**12)
