"""scratchlm predict: every kind of head, rows of files, labels by their likelihood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.cli.main import run
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.evaluate.predict import figures_of
from llm_from_scratch.weights.folder_write import save_folder
from llm_from_scratch.weights.sources import load
from tests.train.tiny_folders import decoder_folder, encoder_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder for each kind of head, all of random weights."""
    base = tmp_path_factory.mktemp("heads")
    found = {"writer": decoder_folder(base / "writer"), "plain": encoder_folder(base / "plain")}
    heads: dict[str, tuple[str, Any]] = {
        "labels": ("classification", ["ham", "spam"]),
        "numbers": ("regression", None),
        "choices": ("multiple_choice", None),
        "names": ("token_classification", ["O", "B-PER", "I-PER"]),
        "missing": ("masked_lm", None),
        "vectors": ("embedding", None),
    }
    for name, (head, labels) in heads.items():
        model, tokenizer = load(found["plain"], head=head, labels=labels, device="cpu")
        save_folder(model, tokenizer, base / name)
        found[name] = str(base / name)
    model, tokenizer = load(found["writer"], head="classification", labels=["choice"], device="cpu")
    save_folder(model, tokenizer, base / "one-label")
    found["one-label"] = str(base / "one-label")
    return found


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["predict", *arguments, "--device", "cpu", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_labels_of_texts(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, models["labels"], "the cat sat", "a good book " * 40)["predictions"]
    assert [row["text"] for row in found] == ["the cat sat", "a good book " * 40]  # the last is cut
    for row in found:
        assert set(row["probabilities"]) == {"ham", "spam"}
        assert row["probability"] == max(row["probabilities"].values())
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert run(["predict", models["labels"], "the cat\nsat"]) == 0
    assert capsys.readouterr().out.endswith("|  the cat sat\n")


def test_rows_of_a_file_are_measured(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"the {word} {n}", "label": "ham"} for n, word in enumerate(["cat", "mat"])]
    data = rows_file(tmp_path / "rows.jsonl", [*rows, {"text": "no label"}, {"label": "ham"}])
    found = asked(capsys, models["labels"], "--data", data)
    assert found["figures"]["rows"] == 2
    assert len(found["predictions"]) == 3
    assert found["predictions"][0]["place"].endswith("rows.jsonl:1")
    right = [row["label"] == "ham" for row in found["predictions"][:2]]
    assert found["figures"]["accuracy"] == sum(right) / 2
    out = tmp_path / "out.jsonl"
    assert run(["predict", models["labels"], "--data", data, "--out", str(out)]) == 0
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["label"] for row in written] == [row["label"] for row in found["predictions"]]
    assert "accuracy" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"rows.jsonl:4: has no field 'text'"):
        run(["predict", models["labels"], "--data", data, "--on_bad", "stop"])


def test_rows_that_cannot_be_answered_are_left_out(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaps = ["the [MASK] sat", "no gap", "the cat " * 60 + "[MASK]"]
    missing = rows_file(tmp_path / "gaps.jsonl", [{"text": text} for text in gaps])
    long = [{"text": "the cat"}, {"text": "the cat sat " * 60}, {"text": "she sang"}]
    prompts = rows_file(tmp_path / "long.jsonl", long)
    for model, data, options, kept, said in (
        ("missing", missing, (), 1, ["2: has no gap for the model", "3: has 123 tokens, and its"]),
        ("writer", prompts, ("--labels", "a,b"), 2, ["2: makes a prompt of "]),
    ):
        arguments = ("predict", models[model], "--data", data, *options)
        out = tmp_path / f"{model}.jsonl"
        assert run([*arguments, "--out", str(out)]) == 0
        assert len(out.read_text(encoding="utf-8").splitlines()) == kept
        left_out = capsys.readouterr().err
        name = Path(data).name
        assert all(f"{name}:{sentence}" in left_out for sentence in said), left_out
        assert left_out.count("Left out: ") == len(said)
        with pytest.raises(UserError, match=f"{name}:2: "):
            run([*arguments, "--on_bad", "stop"])
    alone = rows_file(tmp_path / "alone.jsonl", [{"text": "no gap"}])
    with pytest.raises(UserError, match=r"\(the first reason: .*alone\.jsonl:1: has no gap.*\)\.$"):
        run(["predict", models["missing"], "--data", alone])


def test_no_file_is_written_over(models: dict[str, str], tmp_path: Path) -> None:
    data = rows_file(tmp_path / "rows.jsonl", [{"text": "the cat"}])
    for model in (models["labels"], "nowhere"):  # said before the model is looked for
        with pytest.raises(UserError, match=r"rows\.jsonl already exists\. Choose another --out"):
            run(["predict", model, "--data", data, "--out", data])
    assert Path(data).read_text(encoding="utf-8") == '{"text": "the cat"}\n'


def test_every_other_head(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    row = asked(capsys, models["numbers"], "the cat sat", "--pair", "a mat")["predictions"][0]
    assert isinstance(row["value"], float) and row["pair"] == "a mat"
    for name in ("choices", "one-label"):
        row = asked(capsys, models[name], "who?", "--choices", "the cat", "a", "so")["predictions"][
            0
        ]
        assert row["text"] == ["the cat", "a", "so"][row["choice"]]
        assert len(row["probabilities"]) == 3
    row = asked(capsys, models["names"], "the cat sat on a mat")["predictions"][0]
    assert all(row["text"][one["start"] : one["end"]] == one["text"] for one in row["entities"])
    row = asked(capsys, models["missing"], "the [MASK] sat [MASK]")["predictions"][0]
    assert [len(guesses) for guesses in row["words"]] == [5, 5]
    for name in ("numbers", "names"):
        assert run(["predict", models[name], "the cat sat"]) == 0


def test_labels_by_likelihood(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = models["writer"]
    rows = [{"text": "the cat", "label": 0}, {"text": "a mat", "label": 1}]
    shots = rows_file(tmp_path / "shots.jsonl", rows)
    plain = asked(capsys, writer, "she sang", "--labels", "0=bad,1=good")["predictions"][0]
    assert set(plain["probabilities"]) == {"0", "1"}
    options = ("--labels", "0=bad,1=good", "--shots", shots)
    shown = asked(capsys, writer, "she sang", *options)["predictions"][0]
    even = asked(capsys, writer, "she sang", *options, "--calibrate")["predictions"][0]
    values = [one["probabilities"]["0"] for one in (plain, shown, even)]
    assert len({round(value, 8) for value in values}) == 3
    found = asked(capsys, writer, "--data", shots, "--labels", "0=bad,1=good")
    assert found["figures"]["rows"] == 2


def test_bad_requests(models: dict[str, str], tmp_path: Path) -> None:
    labels, writer = models["labels"], models["writer"]
    for arguments, said in (
        ([labels], "Give either texts or --data"),
        ([labels, "x", "--data", "f"], "not both"),
        ([labels, " "], "no text to predict"),
        ([labels, "--data", "f", "--pair", "x"], "--pair_field"),
        ([labels, "x", "--calibrate"], "name the labels with --labels"),
        ([labels, "x", "--labels", "a,b"], "a model that writes"),
        ([writer, "x"], "--labels good,bad"),
        ([models["plain"], "x"], "no head that labels texts"),
        ([models["vectors"], "x"], "makes vectors"),
        ([models["choices"], "x"], "give the choices"),
        ([models["missing"], "x"], r"write \[MASK\] where a word is missing"),
        ([writer, "x", "--labels", "a"], "at least two"),
        ([writer, "x", "--labels", "a,b", "--template", "{text}"], r"\{label\} at its end"),
    ):
        with pytest.raises(UserError, match=said):
            run(["predict", *arguments])
    empty = rows_file(tmp_path / "none.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match="no row with a text and a label"):
        run(["predict", writer, "x", "--labels", "a,b", "--shots", empty])


def test_figures_by_hand() -> None:
    answers = [{"value": 1.0}, {"value": 2.0}, {"value": 9.0}]
    found = figures_of("numbers", (), answers, [1.0, 3.0, None])
    assert (found["rows"], found["mae"]) == (2, 0.5)
    chosen = [{"choice": 1}, {"choice": 0}]
    assert figures_of("choices", (), chosen, [1, 1]) == {"rows": 2, "accuracy": 0.5}
    assert figures_of("labels", ("a", "b"), [], []) == {}
    said = [{"probabilities": {"a": 0.9, "b": 0.1}}] * 3
    found = figures_of("labels", ("a", "b"), said, ["a", "c", None])
    assert (found["rows"], found["unknown_labels"], found["accuracy"]) == (1, 1, 1.0)
    assert torch.is_grad_enabled()
