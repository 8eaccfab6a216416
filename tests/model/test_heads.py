"""Heads equal the reference library: scores, losses, gradients, folders in both directions."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.heads import (
    HEADS,
    PROBLEMS,
    Embedder,
    Head,
    HeadConfig,
    HeadStyle,
    MaskedLM,
    ScoringHead,
    SequenceClassifier,
    TokenClassifier,
)
from llm_from_scratch.train.head_losses import head_loss
from llm_from_scratch.weights.families import FAMILIES
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.heads import add_head, name_in_class, stored_entries, tied_names
from llm_from_scratch.weights.layouts import put_together
from tests.model.references import make_reference
from tests.model.references_encoders import make_encoder, padded, random_text
from tests.model.references_heads import HEADED, LABELS, batch_for, head_class, make_headed
from tests.model.test_model_parity import assert_close, stored_gradients

Pair = tuple[PreTrainedModel, Head, str]
PER_TOKEN = ("token_classification", "masked_lm")
IGNORED = -100


def as_ours(theirs: PreTrainedModel, folder: Path, head: str | None = None, **options: Any) -> Any:
    """Ours, from the folder that the reference writes."""
    theirs.save_pretrained(folder)
    ours, _ = load_folder(folder, head=head, **options)
    return ours


@pytest.fixture(scope="module", params=HEADED, ids=lambda p: f"{p[0]}-{p[1]}")
def headed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A reference model with a head and ours, loaded from the folder that the reference wrote."""
    family, kind = request.param
    theirs = make_headed(family, kind)
    return theirs, as_ours(theirs, tmp_path_factory.mktemp("headed")), kind


def assert_same_scores(theirs: PreTrainedModel, ours: Head, kind: str) -> None:
    tokens, mask = batch_for(theirs, kind)
    with torch.no_grad():
        got = ours(tokens, attention_mask=mask)
        wanted = theirs(tokens, attention_mask=mask).logits
    if kind in PER_TOKEN:
        got, wanted = got[mask.bool()], wanted[mask.bool()]
    assert_close(got, wanted)


def load_theirs(family: str, kind: str, folder: Path) -> PreTrainedModel:
    back, info = head_class(family, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"]
    return back.eval()


def test_every_head_of_the_table_has_a_class(headed: Pair) -> None:
    theirs, ours, kind = headed
    assert type(ours) is HEADS[kind]
    family = FAMILIES[theirs.config.model_type]
    assert family.classes[kind] == type(theirs).__name__
    kinds = {k for f, k in HEADED if f == family.name}
    assert kinds == set(family.classes) & set(HEADS)


def test_scores_of_their_folder(headed: Pair) -> None:
    assert_same_scores(*headed)


def test_scores_of_our_folder(headed: Pair, tmp_path: Path) -> None:
    theirs, ours, kind = headed
    family = theirs.config.model_type
    save_folder(ours, None, tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["architectures"] == [type(theirs).__name__]
    assert not (tmp_path / "model" / "generation_config.json").exists()
    back = load_theirs(family, kind, tmp_path / "model")
    if ours.head_config.labels:
        assert back.config.id2label == dict(enumerate(LABELS)) == theirs.config.id2label
    back.config.eos_token_id = theirs.config.eos_token_id  # which a tokenizer would bring
    assert_same_scores(back, ours, kind)
    back.save_pretrained(tmp_path / "again")
    again, _ = load_folder(tmp_path / "again")
    assert isinstance(again, Head)
    assert (again.config, again.head_config) == (ours.config, ours.head_config)


def targets_for(scores: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, scores.shape[-1], scores.shape[:-1], generator=generator)
    if kind in PER_TOKEN:
        asked = (torch.rand(mask.shape, generator=generator) < 0.5) & mask.bool()
        labels = torch.where(asked, labels, IGNORED)
    return labels


def in_fp64(theirs: PreTrainedModel, ours: Head) -> tuple[PreTrainedModel, Head]:
    """Both again, so precise that rounding hides nothing.

    In fp32, where BART's attention is nearly one-hot, gradients of the keys nearly cancel: ours and
    the reference's are both 2e-4 from their own in fp64. Gemma 2's softmax is in fp32 always; the
    reference masks with the smallest number of fp64, which is no number there.
    """
    if theirs.config.model_type == "gemma2":
        return theirs, ours
    return copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()


def assert_same_gradients(theirs: PreTrainedModel, ours: Head, labels: torch.Tensor) -> None:
    """Of the loss of both, which must be equal too."""
    kind = ours.head_config.kind
    theirs, ours = in_fp64(theirs, ours)
    if labels.is_floating_point():
        labels = labels.to(next(ours.parameters()).dtype)
    tokens, mask = batch_for(theirs, kind)
    theirs.zero_grad()
    ours.zero_grad()
    wanted_loss = theirs(tokens, attention_mask=mask, labels=labels).loss
    wanted_loss.backward()
    result = head_loss(ours(tokens, attention_mask=mask), labels, ours.head_config)
    loss = result.loss_sum / result.count
    loss.backward()
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6, check_dtype=False)
    family = FAMILIES[theirs.config.model_type]
    table = family.heads[kind]
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(ours.parameters()))
    for parameter in theirs.parameters():
        if parameter.grad is None:  # a bias that is not in use where nothing is tied
            parameter.grad = torch.zeros_like(parameter)
    same = {**table.copies, **tied_names(family, ours)}
    wanted = {same.get(name, name): value for name, value in stored_gradients(theirs)}
    entries = stored_entries(family, ours)
    assert {name_in_class(family, ours, entry.theirs) for entry in entries} == set(wanted)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert largest > 1e-3
    for entry in entries:
        if kind == "multiple_choice" and entry.ours == ("out.bias",):
            continue  # moves all choices alike: its gradient is zero but for rounding
        got = put_together(entry, [gradients[name] for name in entry.ours], ours.stack.n_heads)
        want = wanted[name_in_class(family, ours, entry.theirs)]
        scale = want.abs().max() + 1e-3 * largest
        # Parts of both, such as norms, are in fp32 even here.
        torch.testing.assert_close(got / scale, want / scale, atol=5e-5, rtol=0)


def test_loss_and_gradients(headed: Pair) -> None:
    theirs, ours, kind = headed
    tokens, mask = batch_for(theirs, kind)
    with torch.no_grad():
        scores = ours(tokens, attention_mask=mask)
    assert_same_gradients(theirs, ours, targets_for(scores, mask, kind))


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "gpt2", "bart"])
@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", None])
@pytest.mark.parametrize("count", [1, 3])
def test_other_questions(family: str, problem: str | None, count: int, tmp_path: Path) -> None:
    """Numbers, several right labels, and what the classes guess where nothing is said."""
    names = {"id2label": {i: f"L{i}" for i in range(count)}}
    theirs = make_headed(family, "classification", problem_type=problem, label2id=None, **names)
    ours = as_ours(theirs, tmp_path / "theirs")
    assert ours.head_config.problem_type == problem and len(ours.head_config.labels) == count
    labels = torch.rand(4, count, generator=torch.Generator().manual_seed(1))
    if problem != "regression" and count > 1:
        labels = labels.round()
    assert_same_gradients(theirs, ours, labels)
    save_folder(ours, None, tmp_path / "ours")
    back = load_theirs(family, "classification", tmp_path / "ours")
    guessed = problem if problem or count > 1 else "regression"
    assert back.config.problem_type in (problem, guessed)
    assert back.config.num_labels == count


def test_labels_must_fit_the_scores() -> None:
    head = HeadConfig("classification", labels=("a", "b"), problem_type=PROBLEMS[2])
    with pytest.raises(UserError, match=r"labels have the shape \(4, 3\), the scores \(4, 2\)"):
        head_loss(torch.zeros(4, 2), torch.zeros(4, 3), head)
    one = HeadConfig("classification", labels=("a", "b"), problem_type=PROBLEMS[1])
    for labels, message in (
        (torch.tensor([0, 1, 1]), r"the shape \(3,\) .* one whole number for each row"),
        (torch.zeros(4), "torch.float32"),
        (torch.tensor([0, 1, 2, 0]), "A label is 2, but there are 2 scores"),
        (torch.tensor([0, -1, 1, 0]), "A label is -1"),
    ):
        with pytest.raises(UserError, match=message):
            head_loss(torch.zeros(4, 2), labels, one)
    assert head_loss(torch.zeros(2, 2), torch.tensor([1, -100]), one).count == 1


def test_losses_are_sums() -> None:
    """Batches of any size add up to the same."""
    head = HeadConfig("token_classification", labels=("a", "b", "c"))
    scores = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2, IGNORED, IGNORED]] * 3 + [[1, IGNORED] * 2 + [IGNORED]] * 3)
    whole = head_loss(scores, labels, head)
    parts = [head_loss(scores[rows], labels[rows], head) for rows in ([0], [1, 2, 3, 4], [5])]
    assert int(whole.count) == sum(int(part.count) for part in parts) == 3 * 3 + 3 * 2
    torch.testing.assert_close(whole.loss_sum, sum(part.loss_sum for part in parts))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_last_token_with_padding_on_the_left(family: str, tmp_path: Path) -> None:
    theirs = make_headed(family, "classification")
    ours = as_ours(theirs, tmp_path)
    tokens, mask = padded(random_text(67, 4, 30), 1, "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=mask, position_ids=positions).logits
        assert_close(ours(tokens, attention_mask=mask), wanted)
        right, right_mask = padded(random_text(67, 4, 30), 1)
        alone = ours(right[2:3, : int(right_mask[2].sum())])
        assert_close(ours(right, attention_mask=right_mask)[2:3], alone)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_pools_as_it_says(pooling: str, tmp_path: Path) -> None:
    theirs = make_headed("modernbert", "classification", classifier_pooling=pooling)
    ours = as_ours(theirs, tmp_path)
    assert ours.head_config.style.pooling == pooling
    assert_same_scores(theirs, ours, "classification")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"tie_word_embeddings": False}),
        ("bert", {"hidden_act": "gelu_new"}),
        ("roberta", {"tie_word_embeddings": False, "hidden_act": "relu"}),
        ("distilbert", {"activation": "relu", "tie_word_embeddings": False}),
        ("mpnet", {"tie_word_embeddings": False}),
        ("modernbert", {"decoder_bias": False, "classifier_bias": False, "norm_bias": True}),
        ("modernbert", {"tie_word_embeddings": False, "classifier_activation": "relu"}),
    ],
)
def test_masked_lm_with_other_values(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = make_headed(family, "masked_lm", **changes)
    ours = as_ours(theirs, tmp_path / "theirs")
    assert_same_scores(theirs, ours, "masked_lm")
    save_folder(ours, None, tmp_path / "ours")
    assert_same_scores(load_theirs(family, "masked_lm", tmp_path / "ours"), ours, "masked_lm")


def test_tied_masked_lm_has_one_matrix(tmp_path: Path) -> None:
    ours = as_ours(make_headed("bert", "masked_lm"), tmp_path)
    assert ours.out.weight is ours.backbone.embedding.weight
    moved = ours.to(torch.bfloat16)
    assert moved.out.weight is moved.backbone.embedding.weight


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def test_masked_lm_of_an_older_folder(tmp_path: Path) -> None:
    """The tied matrix stored again, the bias once or twice; another head and a pooler beside."""
    theirs = make_headed("bert", "masked_lm")
    theirs.save_pretrained(tmp_path)
    bias, copy = "cls.predictions.bias", "cls.predictions.decoder.bias"
    matrix, embedding = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"

    def as_of_old(tensors: dict[str, torch.Tensor]) -> None:
        tensors[matrix], tensors[copy] = tensors[embedding].clone(), tensors[bias].clone()
        tensors["cls.seq_relationship.weight"] = torch.zeros(2, 36)
        tensors["bert.pooler.dense.weight"] = torch.zeros(36, 36)
        tensors["bert.pooler.dense.bias"] = torch.zeros(36)

    rewrite(tmp_path, as_of_old)
    ours, _ = load_folder(tmp_path)
    assert isinstance(ours, MaskedLM)
    assert_same_scores(theirs, ours, "masked_lm")
    rewrite(tmp_path, lambda tensors: tensors.pop(bias))
    assert_same_scores(theirs, load_folder(tmp_path)[0], "masked_lm")  # type: ignore[arg-type]
    rewrite(tmp_path, lambda tensors: tensors[matrix].add_(1))
    with pytest.raises(UserError, match="differs from"):
        load_folder(tmp_path)
    load_folder(tmp_path, head="none")  # which does not need it


def test_pretraining_class_is_a_masked_lm(tmp_path: Path) -> None:
    make_headed("bert", "masked_lm").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"architectures": ["BertForPreTraining"]}))
    assert isinstance(load_folder(tmp_path)[0], MaskedLM)
    config.write_text(json.dumps(values | {"architectures": ["BertForQuestionAnswering"]}))
    with pytest.raises(UserError, match=r"BertForQuestionAnswering.*head='none'"):
        load_folder(tmp_path)
    assert isinstance(load_folder(tmp_path, head="none")[0], Encoder)


# What the folder has no tensors for starts with random weights, and is named.
@pytest.mark.parametrize(
    ("family", "stored", "head", "fresh"),
    [
        ("bert", "base", "classification", {"classifier"}),
        ("bert", "masked_lm", "classification", {"bert.pooler.dense", "classifier"}),
        ("bert", "token_classification", "classification", {"bert.pooler.dense", "classifier"}),
        ("bert", "classification", "token_classification", {"classifier"}),
        ("bert", "classification", "multiple_choice", {"classifier"}),
        ("roberta", "base", "classification", {"classifier.dense", "classifier.out_proj"}),
        ("roberta", "base", "masked_lm",
         {"lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"}),
        ("distilbert", "multiple_choice", "regression", {"classifier"}),
        ("mpnet", "base", "token_classification", {"classifier"}),
        ("modernbert", "masked_lm", "classification", {"classifier"}),
        ("modernbert", "base", "masked_lm", {"head.dense", "head.norm", "decoder"}),
        ("llama", "token_classification", "classification", {"score"}),
        ("gpt2", "classification", "token_classification", {"classifier"}),
        ("bart", "lm", "classification",
         {"classification_head.dense", "classification_head.out_proj"}),
        ("t5", "classification", "token_classification", {"classifier"}),
    ],
)  # fmt: skip
def test_a_head_that_is_not_there_starts_fresh(
    family: str, stored: str, head: str, fresh: set[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if stored == "lm":
        from tests.model.references_seq2seq import make_seq2seq

        theirs: PreTrainedModel = make_seq2seq(family)
    elif stored == "base":
        theirs = make_encoder(family)
    else:
        theirs = make_headed(family, stored)
    theirs.save_pretrained(tmp_path / "theirs")
    capsys.readouterr()
    ours, _ = load_folder(tmp_path / "theirs", head=head)
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "must be trained" in said
    assert set(said.partition(": ")[2].partition(" start")[0].split(", ")) == fresh
    assert isinstance(ours, ScoringHead)
    again, _ = load_folder(tmp_path / "theirs", head=head)
    assert_equal_parameters(ours, again)
    assert all(torch.isfinite(p).all() for p in ours.parameters())
    assert not ours.training
    # What it has of the head is taken.
    kept = load_file(tmp_path / "theirs" / "model.safetensors")
    if (family, stored) == ("modernbert", "masked_lm"):
        torch.testing.assert_close(ours.dense.weight, kept["head.dense.weight"])
    if ours.head_config.kind != "masked_lm":
        assert ours.out.weight.std() > 0
        assert ours.out.bias is None or not ours.out.bias.any()
    kind = ours.head_config.kind
    capsys.readouterr()
    save_folder(ours, None, tmp_path / "ours")
    load_theirs(family, kind, tmp_path / "ours")
    assert isinstance(load_folder(tmp_path / "ours")[0], type(ours))
    assert not capsys.readouterr().err.count("must be trained")


def assert_equal_parameters(one: Any, other: Any) -> None:
    first, second = dict(one.named_parameters()), dict(other.named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_labels_by_name_and_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = make_headed("bert", "classification")
    renamed = as_ours(theirs, tmp_path, "classification", labels=["a", "b", "c", "d", "e"])
    assert renamed.head_config.labels == ("a", "b", "c", "d", "e")
    assert_same_scores(theirs, renamed, "classification")
    capsys.readouterr()
    more = as_ours(theirs, tmp_path, "classification", labels=7)
    assert more.head_config.labels == tuple(f"LABEL_{i}" for i in range(7))
    assert "no head for classification with 7 labels: classifier starts" in capsys.readouterr().err
    assert more.out.weight.shape == (7, 36)
    one = as_ours(theirs, tmp_path, "regression")
    assert (one.head_config.problem_type, one.head_config.labels) == ("regression", ("LABEL_0",))
    # What a regression says of itself holds for it alone.
    numbers = make_headed("bert", "classification", problem_type="regression")
    assert as_ours(numbers, tmp_path, "classification").head_config.problem_type == "regression"
    assert as_ours(numbers, tmp_path, "regression").head_config.labels == LABELS
    assert as_ours(numbers, tmp_path, "classification", labels=2).head_config.problem_type is None


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        ("clasification", None, "There is no head 'clasification'.*Did you mean"),
        ("classification", [], "different names, at least one"),
        ("classification", ["a", "a"], "different names"),
        ("classification", 0, "at least 1"),
        ("embedding", 3, "the head 'embedding' has none"),
        ("none", ["a"], "the head 'none' has none"),
    ],
)
def test_heads_asked_for_wrongly(head: str, labels: Any, message: str, tmp_path: Path) -> None:
    make_encoder("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_folder(tmp_path, head=head, labels=labels)


def test_a_head_that_no_class_has(tmp_path: Path) -> None:
    make_reference("olmo2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no class of olmo2 with a head for token_classification"):
        load_folder(tmp_path, head="token_classification", labels=2)
    with pytest.raises(UserError, match="there are classification, embedding"):
        load_folder(tmp_path, head="masked_lm")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "'id2label' must give each number from 0 on a name"),
        ({"id2label": ["a", "b"]}, "'id2label' must give each number"),
        ({"id2label": None, "num_labels": "two"}, "'num_labels' is 'two'"),
        ({"problem_type": "guessing"}, "'problem_type' is 'guessing'; it must be one of"),
        ({"architectures": "BertModel"}, "'architectures' is 'BertModel'; it must be a list"),
        ({"classifier_dropout": 2}, "'classifier_dropout' is 2; it must be below 1"),
        ({"id2label": {"0": "a"}}, r"'classifier.weight' has the shape \(5, 36\).*means \(1, 36\)"),
    ],
)
def test_what_config_json_says_of_a_head(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_headed("bert", "classification").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    with pytest.raises(UserError, match=message):
        load_folder(tmp_path)


def test_missing_and_surplus_tensors_are_named(tmp_path: Path) -> None:
    theirs = make_headed("bert", "classification")
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("classifier.bias"))
    for head in (None, "classification"):
        with pytest.raises(UserError, match=r"lacks 1 tensor.*'classifier.bias'"):
            load_folder(tmp_path, head=head)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"crf.transitions": torch.zeros(3, 3)}))
    for head in (None, "none", "token_classification"):
        with pytest.raises(UserError, match=r"holds 1 tensor.*'crf.transitions'"):
            load_folder(tmp_path, head=head)
    theirs.save_pretrained(tmp_path)
    lost = "bert.encoder.layer.1.output.dense.bias"
    rewrite(tmp_path, lambda tensors: tensors.pop(lost))
    with pytest.raises(UserError, match=f"lacks 1 tensor.*'{lost}'"):
        load_folder(tmp_path, head="embedding")


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_loses_its_output_matrix(tied: bool, tmp_path: Path) -> None:
    make_reference("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "lm")
    ours, _ = load_folder(tmp_path / "lm", head="classification", labels=["no", "yes"])
    assert isinstance(ours, SequenceClassifier)
    plain, _ = load_folder(tmp_path / "lm")
    assert isinstance(plain, Decoder)
    names = {name.removeprefix("backbone.") for name, _ in ours.named_parameters()}
    assert names ^ set(dict(plain.named_parameters())) == {"out.weight"} | (
        set() if tied else {"head.weight"}
    )
    added = add_head(plain, "classification", ["no", "yes"])
    assert_equal_parameters(ours, added)
    save_folder(added, None, tmp_path / "out")
    load_theirs("llama", "classification", tmp_path / "out")


def test_heads_added_to_encoders(tmp_path: Path) -> None:
    make_encoder("bert", options={"add_pooling_layer": False}).save_pretrained(tmp_path / "base")
    encoder, _ = load_folder(tmp_path / "base")
    assert isinstance(encoder, Encoder)
    classifier = add_head(encoder, "classification", 3, seed=4)
    assert encoder.config.pooler and isinstance(classifier, SequenceClassifier)
    save_folder(classifier, None, tmp_path / "out")
    load_theirs("bert", "classification", tmp_path / "out")
    tagger = add_head(encoder, "token_classification", 3)
    assert not encoder.config.pooler and isinstance(tagger, TokenClassifier)
    save_folder(tagger, None, tmp_path / "tagger")
    load_theirs("bert", "token_classification", tmp_path / "tagger")
    with pytest.raises(UserError, match="adds nothing"):
        add_head(encoder, "none")
    with pytest.raises(UserError, match="needs BERT's pooler"):
        Embedder(encoder, HeadConfig("embedding", HeadStyle(pooling="pooler")))


def test_a_style_that_the_class_cannot_express(tmp_path: Path) -> None:
    encoder = load_encoder("bert", tmp_path)
    style = HeadStyle(pooling="mean")
    ours = SequenceClassifier(encoder, HeadConfig("classification", style, labels=("a", "b")))
    with pytest.raises(UserError, match="BertForSequenceClassification cannot express this head"):
        save_folder(ours, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_and_training_mode(tmp_path: Path) -> None:
    theirs = make_headed("roberta", "classification")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    fresh, _ = load_folder(tmp_path, head="token_classification", labels=2)
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}
    tokens, mask = batch_for(theirs, "classification")
    with torch.no_grad():
        wide, _ = load_folder(tmp_path, dtype=torch.float32)
        exact = wide(tokens, attention_mask=mask)
        rounded, reference = ours(tokens, attention_mask=mask), theirs(tokens, attention_mask=mask)
        assert (rounded - exact).std() < 1.5 * (reference.logits - exact).std()
        ours.train()
        assert not torch.equal(ours(tokens), ours(tokens))  # dropout acts


# --- embeddings


def reference_embedding(
    theirs: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, pooling: str
) -> torch.Tensor:
    """What the sentence-transformers library computes, written down row by row."""
    rows = []
    for row in range(len(tokens)):
        length = int(mask[row].sum())
        with torch.no_grad():
            states = theirs(tokens[row : row + 1, :length]).last_hidden_state[0]
        rows.append({"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling])
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "qwen3"])
@pytest.mark.parametrize(("pooling", "normalise"), [("cls", False), ("mean", True), ("last", True)])
def test_embeddings(family: str, pooling: str, normalise: bool, tmp_path: Path) -> None:
    theirs = make_encoder(family) if family != "qwen3" else make_reference(family).base_model
    theirs.save_pretrained(tmp_path / "theirs")
    backbone = as_ours(theirs, tmp_path / "theirs", "embedding").backbone
    style = HeadStyle(pooling=pooling)
    ours = Embedder(backbone, HeadConfig("embedding", style, normalise=normalise, max_length=25))
    tokens, mask = padded(random_text(67, 4, 30), 1)
    wanted = reference_embedding(theirs, tokens, mask, pooling)
    wanted = F.normalize(wanted, dim=-1) if normalise else wanted
    with torch.no_grad():
        assert_close(ours(tokens, attention_mask=mask), wanted)
    save_folder(ours, None, tmp_path / "ours")
    back, info = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(reference_embedding(back.eval(), tokens, mask, "mean"),
                 reference_embedding(theirs, tokens, mask, "mean"))  # fmt: skip
    again, _ = load_folder(tmp_path / "ours", head="embedding")
    assert isinstance(again, Embedder)
    assert again.head_config == ours.head_config
    assert not isinstance(load_folder(tmp_path / "ours", head="none" if family != "qwen3" else
                                      "embedding")[0], SequenceClassifier)  # fmt: skip


def test_an_embedder_without_a_layout(tmp_path: Path) -> None:
    make_encoder("bert").save_pretrained(tmp_path / "bert")
    make_reference("llama").save_pretrained(tmp_path / "llama")
    for family, pooling in (("bert", "mean"), ("llama", "last")):
        ours, _ = load_folder(tmp_path / family, head="embedding")
        assert isinstance(ours, Embedder)
        assert (ours.head_config.style.pooling, ours.head_config.normalise) == (pooling, False)


def test_an_encoder_of_t5_embeds(tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    theirs = make_headed("t5", "classification")
    ours = as_ours(theirs, tmp_path / "theirs", "embedding")
    tokens, mask = batch_for(theirs, "classification")
    with torch.no_grad():
        wanted = theirs.transformer.encoder(tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None] / mask.sum(1)[:, None, None]
        assert_close(ours(tokens, attention_mask=mask), (wanted * weights).sum(1))
    save_folder(ours, None, tmp_path / "ours")
    _, info = T5EncoderModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again, _ = load_folder(tmp_path / "ours", head="embedding")
    assert_equal_parameters(ours, again)


def test_the_layout_of_sentence_embeddings(tmp_path: Path) -> None:
    """Both ways of writing down how states are pooled."""
    make_encoder("bert").save_pretrained(tmp_path)
    types = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(["", "1_Pooling", "2_Normalize"], types, strict=True))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text('{"word_embedding_dimension": 36, "pooling_mode_cls_token": true}')
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 21}')
    ours, _ = load_folder(tmp_path, head="embedding")
    assert isinstance(ours, Embedder)
    assert ours.head_config == HeadConfig(
        "embedding", HeadStyle(pooling="cls"), normalise=True, max_length=21
    )
    pooling.write_text('{"embedding_dimension": 36, "pooling_mode": "lasttoken"}')
    last, _ = load_folder(tmp_path, head="embedding")
    assert isinstance(last, Embedder) and last.head_config.style.pooling == "last"
    plain, _ = load_folder(tmp_path, head="none")
    assert isinstance(plain, Encoder)
    unasked, _ = load_folder(tmp_path)  # the folder says what it is for
    assert isinstance(unasked, Embedder) and unasked.head_config == last.head_config
    for text, message in (
        ('{"pooling_mode_max_tokens": true}', "pools by max; supported"),
        ('{"pooling_mode": ["cls", "mean"]}', "pools by cls, mean"),
        ("[1]", "must hold a JSON object"),
    ):
        pooling.write_text(text)
        with pytest.raises(UserError, match=message):
            load_folder(tmp_path, head="embedding")
    modules.insert(2, {**modules[1], "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="the steps Transformer, Pooling, Dense, Normalize"):
        load_folder(tmp_path)
    assert isinstance(load_folder(tmp_path, head="none")[0], Encoder)
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(UserError, match="not a list of steps"):
        load_folder(tmp_path, head="embedding")
    modules = [modules[0], {**modules[1], "path": "../elsewhere"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="its pooling below"):
        load_folder(tmp_path, head="embedding")


def test_an_embedder_on_the_pooler_is_not_saved(tmp_path: Path) -> None:
    encoder = load_encoder("bert", tmp_path)
    ours = Embedder(encoder, HeadConfig("embedding", HeadStyle(pooling="pooler")))
    tokens = random_text(67, 2, 12)
    with torch.no_grad():
        assert_close(ours(tokens), encoder.pooled(encoder(tokens)))
    with pytest.raises(UserError, match="pools by 'pooler' cannot be saved"):
        save_folder(ours, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def load_encoder(family: str, folder: Path) -> Encoder:
    make_encoder(family).save_pretrained(folder / "theirs")
    ours, _ = load_folder(folder / "theirs")
    assert isinstance(ours, Encoder)
    return ours


def test_fresh_heads_know_nothing(tmp_path: Path) -> None:
    """Small random weights: all labels are about equally likely, and the seed decides which."""
    encoder = load_encoder("distilbert", tmp_path)
    ours = add_head(encoder, "classification", 4)
    first = ours.out.weight.detach().clone()  # type: ignore[union-attr]
    other = add_head(encoder, "classification", 4, seed=1)
    assert not torch.equal(first, other.out.weight)  # type: ignore[arg-type]
    assert torch.equal(first, add_head(encoder, "classification", 4).out.weight)  # type: ignore[arg-type]
    assert math.isclose(float(first.std()), encoder.config.init_std, rel_tol=0.3)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_class_named_without_its_head_is_the_model_alone(family: str, tmp_path: Path) -> None:
    """As in published embedding models: "MaskedLM" in config.json, nothing of it in the weights."""
    theirs = make_encoder(family)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    name = FAMILIES[family].classes["masked_lm"]
    path.write_text(json.dumps({**values, "architectures": [name]}), encoding="utf-8")
    ours, _ = load_folder(tmp_path)
    assert isinstance(ours, Encoder)
    with pytest.raises(UserError, match="lacks"):  # part of a head is no head
        stored = load_file(tmp_path / "model.safetensors")
        part = name_of_a_head_tensor(family)
        save_file({**stored, part: torch.zeros(3)}, tmp_path / "model.safetensors")
        load_folder(tmp_path)


def name_of_a_head_tensor(family: str) -> str:
    return f"{FAMILIES[family].heads['masked_lm'].tensors[0].theirs}.bias"
