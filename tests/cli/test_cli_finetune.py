"""`scratchlm finetune` and `scratchlm dedup` as a person types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from llm_from_scratch.cli.main import run
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.train.methods.names import METHODS
from tests.train.tiny_folders import encoder_folder

FAST = (
    "--train.max_steps 3 --train.batch_size 4 --train.precision fp32 --train.device cpu "
    "--train.eval_every 2"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, labelled rows, and the run that the first command made."""
    folder: Path = tmp_path_factory.mktemp("finetune")
    encoder_folder(folder / "base")
    colours = "red green blue one two three four five six seven".split()
    rows = [f"{label},{label} {a} {b} film" for label in ("good", "bad") for a in colours[:5]
            for b in colours[5:]]  # fmt: skip
    (folder / "rows.csv").write_text("\n".join(["label,text", *rows]) + "\n", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["finetune", "classify", "base", "--data", "rows.csv", "--out", "run"]
        assert run([*words, *FAST, "--train.stop_after", "2"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(words) == 0
    return capsys.readouterr().out


def test_it_goes_on_without_model_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert not Path("run/summary.json").exists()
    resumed = ["finetune", "classify", "--out", "run", "--resume"]
    said = json.loads(printed([*resumed, "--json"], capsys))
    assert said == json.loads(Path("run/summary.json").read_text())
    assert said["steps"] == 3 and 0 <= said["test_accuracy"] <= 1
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    # Whoever gives a number of steps means it, though methods count epochs by themselves.
    assert (saved["train"]["max_steps"], saved["train"]["epochs"]) == (3, None)
    text = printed(resumed, capsys)
    assert re.search(r"^test_accuracy +0\.\d{4}$|^test_accuracy +1\.0000$", text, re.M)
    assert "see report.html there" in text


def test_flags_files_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(
        "method: classify\nmodel: base\ndata: {paths: [rows.csv], val_fraction: 0.2}\n"
        "train: {batch_size: 8}\n"
    )
    words = ["finetune", "classify", "--config", "run.yaml", "--out", "x", "--print_config"]
    found = yaml.safe_load(printed([*words, "--val", "rows.csv", "--train.seed", "5"], capsys))
    assert found["data"]["val"] == ["rows.csv"] and found["data"]["val_fraction"] == 0.2
    train = found["train"]
    assert (train["batch_size"], train["seed"], train["epochs"]) == (8, 5, 3.0)
    both = [*words, "--train.max_steps", "7", "--train.epochs", "2"]
    assert yaml.safe_load(printed(both, capsys))["train"]["epochs"] == 2.0
    with pytest.raises(UserError, match=r"run\.yaml is for classify, not for sft"):
        run(["finetune", "sft", "--config", "run.yaml", "--out", "x"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_itself(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(["finetune", method, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for example in METHODS[method].examples:
        assert example in text
    for setting in ("--data.avoid", "--lora.rank", "--train.learning_rate"):
        assert setting in text
    lines = [line for line in text.split("\n") if re.match(r"  --[a-z0-9_]+\.", line)]
    assert all(len(line.split()) > 2 for line in lines), "a setting without a word about it"


@pytest.mark.parametrize("method", METHODS)
def test_the_examples_are_commands(method: str) -> None:
    """As they stand in the help, they are understood: every flag in them exists."""
    import shlex

    for example in METHODS[method].examples:
        words = shlex.split(example)[1:]
        assert run([*words, "--print_config"]) == 0


# --- dedup ---------------------------------------------------------------------------------------


def test_rows_that_stay_are_written_whole(capsys: pytest.CaptureFixture[str]) -> None:
    long = "the quick brown fox jumps over the lazy dog today"
    Path("d.csv").write_text(f"id,text\n1,{long}\n2,{long.upper()}\n3,see {long}\n4,new words\n")
    words = ["dedup", "d.csv", "--field", "text"]
    text = printed([*words, "--out", "new.jsonl"], capsys)
    assert re.search(r"^exact duplicates +1$", text, re.M) and "d.csv:3" in text
    kept = [json.loads(line) for line in Path("new.jsonl").read_text().splitlines()]
    assert kept == [{"id": "3", "text": f"see {long}"}, {"id": "4", "text": "new words"}]
    Path("test.jsonl").write_text(json.dumps({"text": "New  WORDS"}) + "\n")
    found = json.loads(printed([*words, "--against", "test.jsonl", "--json", "--exact"], capsys))
    assert {name: count for name, count in found.items() if name != "pairs"} == {
        "texts": 4, "exact_duplicates": 1, "exact_in_against": 1, "near_duplicates": 1,
        "near_in_against": 0, "kept": 1, "unreadable": 0,
    }  # fmt: skip
    assert found["pairs"][-1] == {
        "text": "d.csv:5", "like": "test.jsonl:1", "similarity": 1.0, "exact": True,
        "begins": "new words",
    }  # fmt: skip
    assert "pairs" not in printed([*words, "--show", "0"], capsys)
    with pytest.raises(UserError, match=r"new\.jsonl already exists\. Choose another --out\."):
        run([*words, "--out", "new.jsonl"])


def test_documents_and_messages(capsys: pytest.CaptureFixture[str]) -> None:
    Path("docs").mkdir()
    for name in "ab":
        Path("docs", f"{name}.txt").write_text("one text\nof two lines\n")
    printed(["dedup", "docs", "--out", "one.jsonl"], capsys)
    (kept,) = [json.loads(line) for line in Path("one.jsonl").read_text().splitlines()]
    assert kept == {"text": "one text\nof two lines\n", "source": "docs/a.txt"}
    chats = [[{"role": "user", "content": text}] for text in ("Hello there", "hello THERE", "Bye")]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    found = json.loads(printed(["dedup", "chats.jsonl", "--field", "messages", "--json"], capsys))
    assert (found["exact_duplicates"], found["kept"]) == (1, 2)
