"""finetune classify: equal to transformers, exact, and it learns; bad rows are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from llm_from_scratch.core.config import from_dict, merge
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.records import BadRow, Row
from llm_from_scratch.evaluate.classifier import Line, Question, answer, line_of
from llm_from_scratch.model.heads import Head
from llm_from_scratch.train.by_length import ByLength
from llm_from_scratch.train.finetune import finetune
from llm_from_scratch.train.methods.classify import Classify, ClassifyConfig, balanced
from llm_from_scratch.train.run import Run
from llm_from_scratch.weights.folder import load_folder
from llm_from_scratch.weights.sources import load
from tests.model.references_heads import EOS, make_headed
from tests.train.tiny_folders import (
    FOLDERS,
    byte_pairs,
    wordpieces,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("tiny")
    return {name: make(base / name) for name, make in FOLDERS.items()}


def method(**settings: Any) -> Classify:
    return Classify(ClassifyConfig(**from_dict(ClassifyConfig, {"classify": settings}).__dict__))


# --- the same as transformers --------------------------------------------------------------------


def questions(kind: str, *, several: bool, vocab: int) -> list[Question]:
    """Ragged random rows; of choices, every row has as many."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for number in range(5):
        lines = []
        for choice in range(3 if several else 1):
            length = 4 + (7 * number + 3 * choice) % 11
            ids = torch.randint(5, vocab, (length,), generator=generator).tolist()
            segments = [int(at > length // 2) for at in range(length)]
            lines.append(Line([*ids, EOS], [*segments, 1]))
        label = number * 1.3 - 2 if kind == "numbers" else number % 3
        rows.append(Question(lines, label))
    return rows


def their_gradients(theirs: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The gradients of the reference by our names: loaded as if they were weights."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(folder)
    return dict(load_folder(folder)[0].named_parameters())


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "labels"), ("bert", "numbers"), ("bert", "choices"), ("llama", "labels"),
        ("llama", "numbers"), ("bart", "labels"), ("modernbert", "labels"), ("gpt2", "labels"),
    ],
)  # fmt: skip
def test_loss_and_gradients_of_transformers(family: str, kind: str, tmp_path: Path) -> None:
    head = "multiple_choice" if kind == "choices" else "classification"
    one = {"id2label": {0: "value"}, "label2id": {"value": 0}} if kind == "numbers" else {}
    theirs = make_headed(family, head, **one).eval()
    theirs.save_pretrained(tmp_path / "model")
    ours, _ = load_folder(tmp_path / "model")
    several = kind == "choices"
    items = questions(kind, several=several, vocab=60)
    found = method(kind=kind)
    batch = found.collate(items)
    result = found.step(ours, batch)
    (result.loss_sum / result.count).backward()
    assert result.count == 5
    assert result.tokens == sum(len(line.ids) for item in items for line in item.lines)

    pad = theirs.config.pad_token_id
    shape = (5, 3, -1) if several else (5, -1)
    given = {
        "input_ids": batch.tokens.masked_fill(batch.mask == 0, pad).view(shape),
        "attention_mask": batch.mask.view(shape),
    }
    if family == "bert":
        given["token_type_ids"] = batch.segments.view(shape)
    else:
        ours.zero_grad()  # segments mean nothing to the others, and change nothing
        batch.segments.zero_()
        result = found.step(ours, batch)
        (result.loss_sum / result.count).backward()
    if kind == "numbers":
        theirs.config.problem_type = "regression"
    loss = theirs(**given, labels=batch.labels).loss
    loss.backward()
    torch.testing.assert_close(result.loss_sum / result.count, loss, rtol=1e-5, atol=1e-6)
    wanted = their_gradients(theirs, tmp_path / "gradients")
    largest = max(float(p.grad.abs().max()) for p in ours.parameters())
    for name, parameter in ours.named_parameters():
        error = float((parameter.grad - wanted[name].detach()).abs().max())
        assert error <= 1e-5 * largest, name


def test_choices_of_different_number(folders: dict[str, str]) -> None:
    """A row's loss does not depend on how many choices others have."""
    model, _ = load(folders["encoder"], head="multiple_choice", device="cpu")
    found = method(kind="choices")
    items = questions("choices", several=True, vocab=60)
    items[1] = Question(items[1].lines[:2], 1)
    together = found.step(model, found.collate(items)).loss_sum
    alone = sum(found.step(model, found.collate([item])).loss_sum for item in items)
    torch.testing.assert_close(together, alone)
    scores = answer(model, items, several=True)
    assert [len(row) for row in scores] == [3, 2, 3, 3, 3]


@pytest.mark.parametrize("kind", ["labels", "numbers", "choices"])
def test_the_size_of_batches_changes_nothing(kind: str, folders: dict[str, str]) -> None:
    head = {"labels": "classification", "numbers": "regression", "choices": "multiple_choice"}[kind]
    labels = ["a", "b", "c"] if kind == "labels" else None
    model, _ = load(folders["encoder"], head=head, labels=labels, device="cpu", dtype="fp32")
    found = method(kind=kind)
    items = questions(kind, several=kind == "choices", vocab=60)

    def gradients(sizes: list[int]) -> list[torch.Tensor]:
        model.zero_grad()
        start = 0
        for size in sizes:
            found.step(model, found.collate(items[start : start + size])).loss_sum.backward()
            start += size
        return [p.grad.clone() for p in model.parameters()]

    whole, parts = gradients([5]), gradients([1, 3, 1])
    largest = max(float(g.abs().max()) for g in whole)
    assert max(float((a - b).abs().max()) for a, b in zip(whole, parts, strict=True)) <= (
        1e-6 * largest
    )


# --- runs ----------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


NOUNS = "film book song cat mat king dog tree house river stone bird".split()


def reviews(count: int = 120) -> list[dict[str, Any]]:
    """A word decides: no two rows alike."""
    words = ["good", "fine", "bad", "poor"]
    return [
        {
            "text": f"the {NOUNS[i // 4 % 12]} {i} was {words[i % 4]} and {NOUNS[i * 7 % 11]}",
            "label": "yes" if i % 4 < 2 else "no",
        }
        for i in range(count)
    ]


def run_on(
    folder: Path, model: str, rows: list[dict[str, Any]], **changes: Any
) -> tuple[Run, Path]:
    base: dict[str, Any] = {
        "model": model,
        "out": str(folder / "run"),
        "data": {"paths": [write(folder / "rows.jsonl", rows)], "test_fraction": 0.2},
        "train": {
            "max_steps": 60, "epochs": None, "batch_size": 12, "learning_rate": 4e-3,
            "precision": "fp32", "device": "cpu", "eval_every": 20, "checkpoint_every": 20,
        },
    }  # fmt: skip
    config = from_dict(ClassifyConfig, merge(base, changes))
    return finetune("classify", config, quiet=True), Path(config.out)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_run_learns_labels(kind: str, folders: dict[str, str], tmp_path: Path) -> None:
    run, out = run_on(tmp_path, folders[kind], reviews())
    summary = run.summary
    assert summary["test_rows"] == 24 and summary["val_rows"] == 12
    assert summary["test_accuracy"] >= 0.9 > summary["base_test_accuracy"]
    assert {"test_f1", "test_macro_f1", "test_mcc", "test_ece"} <= set(summary)
    report = (out / "report.md").read_text(encoding="utf-8")
    for title in ("Confusion matrix", "Calibration", "Most confident errors", "Label statistics"):
        assert f"## {title}" in report
    assert "the film" in report
    model, tokenizer = load(str(out), device="cpu")
    assert isinstance(model, Head)
    assert model.head_config.labels == ("no", "yes")
    line = line_of(tokenizer, "the river 43 was poor and dog")
    assert answer(model, [Question([line])])[0].argmax() == 0


@pytest.mark.parametrize("kind", FOLDERS)
def test_transformers_reads_the_result(kind: str, folders: dict[str, str], tmp_path: Path) -> None:
    """Padded on the right, as it would be there."""
    _, out = run_on(tmp_path, folders[kind], reviews(40), train={"max_steps": 2})
    theirs = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    assert theirs.config.id2label == {0: "no", 1: "yes"}
    assert theirs.config.problem_type == "single_label_classification"
    model, tokenizer = load(str(out), device="cpu")
    rows = [Question([line_of(tokenizer, row["text"])]) for row in reviews(5)]
    batch = method().collate(rows)
    pad = theirs.config.pad_token_id
    theirs.config.eos_token_id = tokenizer.sep_id  # what BART's class looks for
    if pad is None:  # the tokenizer has no padding: one row at a time, as transformers asks for
        wanted = [theirs(torch.tensor([q.lines[0].ids])).logits[0] for q in rows]
    else:
        ids = batch.tokens.masked_fill(batch.mask == 0, pad)
        wanted = list(theirs(ids, attention_mask=batch.mask).logits)
    for got, want in zip(answer(model, rows), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_run_learns_numbers_of_pairs(folders: dict[str, str], tmp_path: Path) -> None:
    words = ("poor", "bad", "fine", "good")
    rows = [
        {"a": f"the {NOUNS[i // 4 % 12]} {i}", "b": f"a {words[i % 4]} one", "score": f"{i % 4}.5"}
        for i in range(100)
    ]
    settings = {
        "kind": "numbers", "text_field": "a", "pair_field": "b", "label_field": "score",
    }  # fmt: skip
    run, out = run_on(
        tmp_path,
        folders["encoder"],
        rows,
        classify=settings,
        data={"drop_duplicates": False},
        train={"max_steps": 100, "eval_every": 50},
    )
    assert run.summary["test_spearman"] > 0.8 > run.summary["base_test_spearman"]
    assert run.summary["test_mae"] < run.summary["base_test_mae"]
    assert "## Largest errors" in (out / "report.md").read_text(encoding="utf-8")
    model, _ = load(str(out), device="cpu")
    assert isinstance(model, Head) and model.head_config.problem_type == "regression"


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_run_learns_choices(kind: str, folders: dict[str, str], tmp_path: Path) -> None:
    """Encoders have a class for it; a decoder scores each choice with a head of one label."""
    rows = [
        {
            "text": f"the {NOUNS[i % 12]} {i}",
            "choices": ["it was poor", "it was good", "it was bad"][:: 1 if i % 3 else -1][: 3],
            "label": "B" if i % 2 else 1,
        }
        for i in range(80)
    ]  # fmt: skip
    for i, row in enumerate(rows):
        at = i % 3
        row["choices"] = [c for c in row["choices"] if c != "it was good"]
        row["choices"].insert(at, "it was good")
        row["label"] = ("ABC"[at], at, "it was good")[i % 3]
    run, out = run_on(tmp_path, folders[kind], rows, classify={"kind": "choices"})
    assert run.summary["test_accuracy"] >= 0.9 > run.summary["base_test_accuracy"]
    model, _ = load(str(out), device="cpu")
    assert type(model).__name__ == ("MultipleChoice" if kind == "encoder" else "SequenceClassifier")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("decoder", {"lora": {"rank": 4}}),
        ("encoder", {"lora": {"rank": 4}}),
        ("encoder", {"freeze": {"blocks": 1, "embeddings": True}}),
    ],
)
def test_adapters_and_frozen_layers_train_the_head(
    kind: str, changes: dict[str, Any], folders: dict[str, str], tmp_path: Path
) -> None:
    run, out = run_on(tmp_path, folders[kind], reviews(40), train={"max_steps": 5}, **changes)
    assert run.summary["trainable_parameters"] < run.summary["parameters"]
    before, _ = load(folders[kind], head="classification", labels=["no", "yes"], device="cpu")
    after, _ = load(str(out), device="cpu")
    assert isinstance(before, Head) and isinstance(after, Head)
    was, now = (dict(model.named_parameters()) for model in (before, after))
    assert not torch.equal(was["out.weight"], now["out.weight"])
    assert torch.equal(was["backbone.embedding.weight"], now["backbone.embedding.weight"])


@pytest.mark.parametrize("stop", [3, 20])
def test_a_resumed_run_is_the_straight_one(
    stop: int, folders: dict[str, str], tmp_path: Path
) -> None:
    """Bit by bit, dropout included."""
    changes: dict[str, Any] = {"train": {"max_steps": 30, "eval_every": 7}}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run_on(tmp_path / "a", folders["encoder"], reviews(), **changes)
    changes["train"]["stop_after"] = stop
    stopped, out = run_on(tmp_path / "b", folders["encoder"], reviews(), **changes)
    assert stopped.interrupted
    finetune("classify", ClassifyConfig(out=str(out)), resume=True, quiet=True)
    a, b = (
        load_file(tmp_path / x / "run" / "checkpoints" / "step-30" / "model.safetensors")
        for x in "ab"
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "a/run/summary.json").is_file() and (out / "summary.json").is_file()


def test_a_classifier_of_the_same_labels_keeps_their_order(
    folders: dict[str, str], tmp_path: Path
) -> None:
    rows = reviews(40)
    first = {"classify": {"labels": ["yes", "no"]}, "train": {"max_steps": 2}}
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    _, one = run_on(tmp_path / "1", folders["encoder"], rows, **first)
    _, two = run_on(tmp_path / "2", str(one), rows, train={"max_steps": 2})
    model, _ = load(str(two), device="cpu")
    assert isinstance(model, Head)
    assert model.head_config.labels == ("yes", "no")


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "row", "said"),
    [
        ({}, {"txt": "x"}, r"no field 'text' \(there is 'txt'\).*--classify.text_field"),
        ({}, {"text": " ", "label": 1}, "an empty text in the field 'text'"),
        ({}, {"text": ["x"], "label": 1}, "a list in the field 'text'"),
        ({}, {"text": "x"}, "no field 'label'.*--classify.label_field"),
        ({}, {"text": "x", "label": None}, "nothing in the field 'label'"),
        ({}, {"text": "x", "label": " "}, "an empty 'label'"),
        ({}, {"text": "x", "label": ["a"]}, "a list as 'label'"),
        ({"labels": ["ham", "spam"]}, {"text": "x", "label": "spm"}, "Did you mean 'spam'"),
        ({"pair_field": "b"}, {"text": "x", "label": 1}, "no field 'b'.*--classify.pair_field"),
        ({"kind": "numbers"}, {"text": "x", "label": "two"}, "'two' as 'label', where a number"),
        ({"kind": "numbers"}, {"text": "x", "label": "inf"}, "'inf' as 'label', where a number"),
        ({"kind": "choices"}, {"text": "x", "label": 0}, "no field 'choices'"),
        ({"kind": "choices"}, {"text": "x", "label": 0, "choices": "a"}, "no list in the field"),
        ({"kind": "choices"}, {"text": "x", "label": 0, "choices": ["a"]}, "fewer than two"),
        (
            {"kind": "choices"}, {"text": "x", "label": 2, "choices": ["a", "b"]},
            "'2' as 'label', which is none of its 2 choices",
        ),
        (
            {"kind": "choices"}, {"text": "x", "label": "9" * 5000, "choices": ["a", "b"]},
            "which is none of its 2 choices",
        ),
        (
            {"kind": "choices"}, {"text": "x", "label": "C", "choices": ["a", "b"]},
            "a number from 0, a letter from A",
        ),
    ],
)  # fmt: skip
def test_bad_rows(settings: dict[str, Any], row: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRow, match=said):
        method(**settings).check(row)


def test_what_a_label_is() -> None:
    found = method()
    for given, label in ((1, "1"), (1.0, "1"), ("1", "1"), (True, "true"), (" spam", "spam")):
        assert found.check({"text": "x", "label": given})["label"] == label
    columns = method(kind="choices", choices_fields=["c0", "c1"])
    row = columns.check({"text": "x", "c0": "a", "c1": 5, "label": "1 "})
    assert row == {"text": "x", "choices": ["a", "5"], "label": 1}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "label"}, "one of labels, numbers, choices.* Did you mean 'labels'"),
        ({"kind": "numbers", "balance": True}, "are for rows with labels"),
        ({"labels": ["a"]}, "different labels, at least two"),
        ({"labels": ["a", "a"]}, "different labels"),
        ({"labels": ["ham", "spam"], "positive": "spm"}, "Did you mean 'spam'"),
        ({"kind": "choices", "choices_fields": []}, "choices_fields is empty"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        method(**settings)


def test_one_class_only(folders: dict[str, str], tmp_path: Path) -> None:
    rows = [{**row, "label": "no"} for row in reviews(30)]
    with pytest.raises(UserError, match=r"\(the first is .*rows.jsonl:\d+\) have the label 'no'"):
        run_on(tmp_path, folders["encoder"], rows)


def test_labels_never_seen_and_rows_too_long(folders: dict[str, str], tmp_path: Path) -> None:
    rows = [*reviews(40), {"text": "good " * 70, "label": "yes"}]
    test = write(tmp_path / "test.jsonl", [{"text": "the new film", "label": "maybe"}, *rows[:5]])
    data = {"test": [test], "drop_duplicates": False}
    run, out = run_on(tmp_path, folders["encoder"], rows, data=data, train={"max_steps": 1})
    skipped = (out / "data" / "skipped.txt").read_text(encoding="utf-8")
    assert "test.jsonl:1: has the label 'maybe', which no training row has (there are no, yes)" in (
        skipped
    )
    assert "rows.jsonl:41: has 72 tokens, more than 64" in skipped
    assert run.summary["skipped_rows"] == 2 and run.summary["test_rows"] == 5


def test_cut_rows(folders: dict[str, str], tmp_path: Path) -> None:
    rows = [*reviews(40), {"text": "good " * 70, "label": "yes"}]
    run, _ = run_on(
        tmp_path, folders["encoder"], rows, classify={"cut": True}, train={"max_steps": 1}
    )
    assert run.summary["skipped_rows"] == 0


def test_balance() -> None:
    rows = [Row({"label": "ham" if i % 4 else "spam"}, f"f:{i}") for i in range(40)]
    found = balanced(rows, 3)
    assert [row.values["label"] for row in found].count("ham") == 10 == len(found) / 2
    assert found == [row for row in rows if row in found] == balanced(rows, 3)
    assert found != balanced(rows, 4)
    assert balanced([], 1) == []


def test_pairs_without_a_separator_are_two_lines(tmp_path: Path) -> None:
    decoder, encoder = byte_pairs(), wordpieces()
    assert decoder.decode(line_of(decoder, "the cat", "sat").ids) == "the cat\nsat"
    line = line_of(encoder, "the cat", "sat")
    assert set(line.segments) == {0, 1} and line.ids.count(encoder.sep_id) == 2
    assert len(line_of(encoder, "the cat " * 20, "sat", 12).ids) == 12


# --- the order of examples -----------------------------------------------------------------------


class Sized(list[int]):
    """Something with a length and a name."""


def test_batches_of_like_length() -> None:
    items = [Sized([i] * (1 + (i * 37) % 50)) for i in range(403)]
    source = ByLength(items, lambda batch: batch, seed=5, batch_size=8)
    epochs = [[source.item(n)[0] for n in range(e * 403, (e + 1) * 403)] for e in range(3)]
    assert all(sorted(epoch) == list(range(403)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    padded = sum(8 * max(map(len, source.batch(start, 8))) for start in range(0, 1200, 8))
    assert padded < 1.25 * 3 * sum(map(len, items))
    again = ByLength(items, lambda batch: batch, seed=5, batch_size=8)
    assert [again.item(500)] == [source.item(500)]  # whatever was asked before
    short = ByLength(items[:3], lambda batch: batch, seed=5, batch_size=8)
    assert len(short.batch(0, 8)) == 8
