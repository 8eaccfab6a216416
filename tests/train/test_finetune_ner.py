"""finetune ner: equal to transformers, exact, and it learns; on every kind of model."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForTokenClassification

from llm_from_scratch.core.config import from_dict, merge
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.data.records import BadRow, BadRows, Row, stored_rows
from llm_from_scratch.evaluate.tagger import FILE, Reader, Reading, load_tagger
from llm_from_scratch.model.crf import Chain
from llm_from_scratch.model.heads import TokenClassifier
from llm_from_scratch.train.finetune import finetune
from llm_from_scratch.train.methods.ner import Ner, NerConfig
from llm_from_scratch.train.run import Run
from llm_from_scratch.weights.folder import load_folder
from tests.model.references_heads import LABELS as CLASSES
from tests.model.references_heads import make_headed
from tests.train.tiny_folders import FOLDERS, byte_pairs, wordpieces

NAMES = {"PER": ["sam", "ann lee", "bob"], "LOC": ["old town", "rome", "big bay"]}
FORMS = ["{PER} sang to {PER}", "{PER} saw {LOC} and {LOC}", "it was good in {LOC}", "so she sat"]


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in which names stand at known places."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        text, entities = f"{number} ", []
        for part in draw.choice(FORMS).split(" "):
            kind = part.strip("{}")
            word = draw.choice(NAMES[kind]) if kind in NAMES else part
            if kind in NAMES:
                entities.append([len(text), len(text) + len(word), kind])
            text += word + " "
        rows.append({"text": text.strip(), "entities": entities})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, sentences(80))), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("tiny")
    return {name: make(base / name) for name, make in FOLDERS.items() if name != "encoder-decoder"}


def config(model: str, path: str, out: Path, **changes: Any) -> NerConfig:
    values = {
        "model": model, "out": str(out),
        "data": {"paths": [path], "drop_duplicates": False},
        "train": {
            "max_steps": 6, "epochs": None, "batch_size": 8, "learning_rate": 1e-3, "eval_every": 3,
            "checkpoint_every": 3, "device": "cpu", "precision": "fp32",
        },
    }  # fmt: skip
    return from_dict(NerConfig, merge(values, changes))


def run(model: str, path: str, out: Path, **changes: Any) -> Run:
    return finetune("ner", config(model, path, out, **changes), quiet=True)


def opened(model: str, rows: list[dict[str, Any]], **changes: Any) -> tuple[Ner, Any, list[Any]]:
    """The method, its model and the rows as items."""
    method = Ner(config(model, "rows.jsonl", Path("run"), **changes))
    checked = [Row(method.check(row), f"rows:{n}") for n, row in enumerate(rows)]
    method.learn(checked)
    model_, items = method.open(), [method.encode(row.values) for row in checked]
    return method, model_, items


# --- the same as transformers, and exact ---------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "gpt2", "t5"])
def test_loss_and_gradients_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = make_headed(family, "token_classification").eval()
    theirs.save_pretrained(tmp_path / "model")
    ours, _ = load_folder(tmp_path / "model")
    assert isinstance(ours, TokenClassifier)
    ours.chain = Chain(CLASSES, learnt=False)
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([9, 4, 12])
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(5, 60, (3, 12), generator=generator)
    ids = ids.masked_fill(mask == 0, theirs.config.pad_token_id)
    takes = torch.tensor([[1, 2, 5, 8], [0, 3, 0, 0], [0, 4, 6, 11]])
    decides = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    tags = torch.randint(0, 5, (3, 4), generator=generator).masked_fill(~decides, IGNORED)
    method = Ner(NerConfig())
    batch = {"ids": ids, "mask": mask, "takes": takes, "decides": decides, "tags": tags}
    result = method.step(ours, batch)
    (result.loss_sum / result.count).backward()
    assert int(result.count) == 10
    assert result.tokens == 25

    labels = torch.full((3, 12), IGNORED)
    for row in range(3):
        labels[row, takes[row][decides[row]]] = tags[row][decides[row]]
    loss = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert (result.loss_sum / result.count).item() == pytest.approx(loss.item(), abs=1e-5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    wanted = dict(load_folder(tmp_path / "gradients")[0].named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("crf", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_gradients_do_not_depend_on_how_rows_are_put_together(
    kind: str, crf: bool, folders: dict[str, str]
) -> None:
    rows = sentences(6)
    rows[2]["text"] += " and so it was good" * 6  # several windows
    method, model, items = opened(folders[kind], rows, ner={"crf": crf}, data={"max_length": 20})
    model.eval()
    assert any(len(item.pieces) > 1 for item in items)
    found = []
    for sizes in ([6], [1, 2, 3]):
        model.zero_grad()
        start = count = 0
        for size in sizes:
            result = method.step(model, method.collate(items[start : start + size]))
            result.loss_sum.backward()
            count += int(result.count)
            start += size
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([g.flatten() for g in grads]) / count)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6 * found[0].abs().max().item())


def test_resume_is_bitwise(folders: dict[str, str], data: str, tmp_path: Path) -> None:
    run(folders["encoder"], data, tmp_path / "straight")
    assert run(folders["encoder"], data, tmp_path / "cut", train={"stop_after": 4}).interrupted
    finetune("ner", NerConfig(out=str(tmp_path / "cut")), resume=True, quiet=True)
    for name in ("checkpoints/step-6/model.safetensors", f"model/{FILE}"):
        a, b = (load_file(tmp_path / way / name) for way in ("straight", "cut"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


# --- it learns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("encoder", {}), ("encoder", {"unit": "word", "crf": False}), ("decoder", {"unit": "word"}),
        ("decoder", {"twice": True}),
    ],
)  # fmt: skip
def test_a_run_finds_names(
    kind: str, settings: dict[str, Any], folders: dict[str, str], data: str, tmp_path: Path
) -> None:
    learn = {"max_steps": 60, "learning_rate": 1e-2, "eval_every": 60, "batch_size": 8}
    result = run(folders[kind], data, tmp_path / "run", ner=settings, train=learn)
    figures = result.summary
    assert figures["test_f1"] > 0.85 > figures["base_test_f1"] + 0.3
    assert figures["test_reachable_f1"] == 1
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    for title in ("Entities by type", "Kinds of errors", "Confusion matrix", "Calibration"):
        assert f"## {title}" in report
    assert "PER]" in report.replace("\\", "")

    # What was saved says the same, also by itself and in transformers.
    tagger = load_tagger(tmp_path / "run", device="cpu")
    rows = [row.values for row in stored_rows(tmp_path / "run" / "data" / "test.jsonl")]
    found = tagger.find([row["text"] for row in rows])
    right = wanted = 0
    for row, entities in zip(rows, found, strict=True):
        spans = {(e.start, e.end, e.type) for e in entities}
        assert all(row["text"][e.start : e.end] == e.text for e in entities)
        assert all(0 < e.confidence <= 1 for e in entities)
        right += len(spans & {tuple(e) for e in row["entities"]})
        wanted += len(row["entities"])
    assert right / wanted == pytest.approx(figures["test_recall"])
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "model").eval()
    ids = torch.tensor([tagger.reader.read([rows[0]["text"]], [None])[0].pieces[0].ids])
    with torch.no_grad():
        ours = tagger.model(ids)
        torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def tagger(folders: dict[str, str], data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a short run."""
    out = tmp_path_factory.mktemp("first") / "run"
    run(folders["encoder"], data, out, train={"max_steps": 20})
    return out / "model"


def test_a_run_goes_on_with_a_tagger(tagger: Path) -> None:
    method, model, _ = opened(str(tagger), sentences(10))
    stored = load_file(tagger / FILE)
    legal = model.chain.legal_table
    torch.testing.assert_close(model.chain.scores()[1][legal], stored["table"][legal])
    head = load_file(tagger / "model.safetensors")["classifier.weight"]
    assert torch.equal(model.out.weight, head)
    method.settings = from_dict(NerConfig, {"ner": {"crf": False}}).ner
    assert not method.open().chain.learnt  # type: ignore[union-attr]


def test_lora_trains_head_and_chain(folders: dict[str, str], data: str, tmp_path: Path) -> None:
    result = run(folders["encoder"], data, tmp_path / "run", lora={"rank": 2})
    assert 0 < result.summary["trainable_parameters"] < result.summary["parameters"] / 2
    best = load_file(tmp_path / "run" / "checkpoints" / "best.safetensors")
    assert best["chain.table"].any()
    assert "out.weight" in best
    texts = [row["text"] for row in sentences(5)]
    merged = load_tagger(tmp_path / "run", device="cpu").find(texts)
    adapted = load_tagger(tmp_path / "run" / "adapter", device="cpu").find(texts)
    assert [[(e.start, e.end, e.type) for e in row] for row in merged] == [
        [(e.start, e.end, e.type) for e in row] for row in adapted
    ]
    assert (tmp_path / "run" / "adapter" / FILE).is_file()
    finetune("ner", NerConfig(out=str(tmp_path / "run")), resume=True, quiet=True)  # once more


# --- long texts, Japanese, words ----------------------------------------------------------------


def test_a_long_text_is_the_same_text_in_windows(folders: dict[str, str]) -> None:
    """Deep in a window a unit sees enough: names repeat, and so must what is found."""
    rows = sentences(12)
    text = " ".join(row["text"] for row in rows)
    tokenizer = wordpieces()
    whole = Reader(tokenizer, Reading(max_length=4096), causal=False).read([text], [None])[0]
    cut = Reader(tokenizer, Reading(max_length=20), causal=False).read([text], [None])[0]
    assert whole.units == cut.units
    assert len(cut.pieces) > 5
    assert [n for p in cut.pieces for n in range(p.first, p.first + len(p.takes))] == list(
        range(len(cut.units))
    )
    ids = [whole.pieces[0].ids[take] for take in whole.pieces[0].takes]
    assert ids == [piece.ids[take] for piece in cut.pieces for take in piece.takes]
    assert all(len(piece.ids) <= 20 for piece in cut.pieces)
    assert all(piece.ids[0] == tokenizer.cls_id for piece in cut.pieces)


def test_a_name_across_two_windows_is_not_learnt_in_halves(folders: dict[str, str]) -> None:
    text = "so " * 20 + "old town " * 8 + "so " * 20
    row = {"text": text, "entities": [[60, 131, "LOC"]]}
    method, _, (item,) = opened(folders["encoder"], [row], data={"max_length": 24})
    assert len(item.pieces) > 2
    for piece in item.pieces:
        assert not method.labels[item.tags[piece.first]].startswith("I-")


def test_what_a_decoder_reads_twice() -> None:
    tokenizer = byte_pairs()
    once = Reader(tokenizer, Reading(), causal=True).read(["sam saw rome"], [None])[0]
    reader = Reader(tokenizer, Reading(twice=True, max_length=24), causal=True)
    twice = reader.read(["sam saw rome"], [None])[0]
    (one,), (two,) = once.pieces, twice.pieces
    assert two.ids == [*one.ids, *tokenizer.encode("\n"), *one.ids]
    assert [two.ids[take] for take in two.takes] == [one.ids[take] for take in one.takes]
    assert min(two.takes) > len(one.ids)
    long = reader.read(["sam saw rome " * 9], [None])[0]
    assert all(len(piece.ids) <= 24 for piece in long.pieces)


@pytest.mark.parametrize("unit", ["token", "word"])
def test_japanese_rows(unit: str, folders: dict[str, str]) -> None:
    """Bytes of one character are one unit, so that every border can be expressed."""
    row = {"tokens": ["東京", "の", "花子", "と", "太郎"], "tags": "B-L O B-P O B-P".split()}
    method, _, (item,) = opened(folders["decoder"], [row], ner={"unit": unit})
    assert method._reachable(item) == [(0, 2, "L"), (3, 5, "P"), (6, 8, "P")]


def test_units_are_words_where_rows_say_so(folders: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("Sam\tB-PER\n,\tO\nhi\tO\n\nold\tB-LOC\ntown\tI-LOC\n", encoding="utf-8")
    method = Ner(config(folders["encoder"], str(path), tmp_path / "run"))
    rows = list(method.read(str(path), BadRows()))
    method.learn(rows)
    assert method.unit == "word"
    path.rename(tmp_path / "a.tsv")  # in a folder, and called like a table
    found = list(method.read(str(tmp_path), BadRows()))
    assert [row.values for row in found] == [row.values for row in rows]
    mixed = Ner(config(folders["encoder"], str(path), tmp_path / "run"))
    mixed.learn([*rows, Row({"text": "x", "entities": []}, "x:1")])
    assert mixed.unit == "token"


# --- what is refused ---------------------------------------------------------------------------


def test_bad_rows_are_named(folders: dict[str, str], tmp_path: Path) -> None:
    rows = sentences(30)
    strange = {"text": "it was good", "entities": [[0, 2, "GOD"]]}
    for name, some in (("train", rows), ("val", [*sentences(3, 1), strange])):
        bad = [{"text": "", "entities": []}, {"text": "a", "entities": [[0, 5, "PER"]]}]
        lines = [json.dumps(row) for row in (*bad, *some)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run(
        folders["encoder"], str(tmp_path / "train.jsonl"), tmp_path / "run",
        data={"val": [str(tmp_path / "val.jsonl")]}, train={"max_steps": 2},
    )  # fmt: skip
    skipped = (tmp_path / "run" / "data" / "skipped.txt").read_text(encoding="utf-8")
    assert "train.jsonl:1: has nothing but white space in 'text'" in skipped
    assert "train.jsonl:2: has an entity at [0, 5]" in skipped
    assert "val.jsonl:6: has the entity 'it' of the type 'GOD', which no training row" in skipped
    with pytest.raises(UserError, match=r"train\.jsonl:1: has nothing"):
        run(
            folders["encoder"], str(tmp_path / "train.jsonl"), tmp_path / "stop",
            data={"on_bad": "stop"},
        )  # fmt: skip


def test_rows_without_any_entity(folders: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"so it was {n}", "entities": []}) for n in range(20)]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"None of the .* training rows .* has an entity"):
        run(folders["encoder"], str(path), tmp_path / "run")


def test_settings_that_are_refused(folders: dict[str, str]) -> None:
    for settings, message in (
        ({"unit": "wrd"}, "it must be auto, token or word"), ({"overlap": 1.0}, r"in \[0, 1\)"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            from_dict(NerConfig, {"ner": settings})
    with pytest.raises(UserError, match=r"ner\.twice is for decoders"):
        opened(folders["encoder"], sentences(4), ner={"twice": True})
    with pytest.raises(UserError, match="leave no room"):
        opened(folders["encoder"], sentences(4), data={"max_length": 3})


def test_a_text_of_nothing_that_the_vocabulary_has(folders: dict[str, str]) -> None:
    method, model, _ = opened(folders["encoder"], sentences(4))
    with pytest.raises(BadRow, match="no character that this model's tokenizer knows"):
        method.encode({"text": "\u200b", "entities": []})
    found = method.tagger(model).find(["", " \n", "sam"])
    assert found[:2] == [[], []]
    with pytest.raises(UserError, match="list of texts"):
        method.tagger(model).find("sam")


def test_folders_that_are_no_taggers(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model that labels tokens"):
        load_tagger(folders["encoder"], device="cpu")
    theirs = make_headed("bert", "token_classification", vocab_size=400)
    theirs.save_pretrained(tmp_path / "parts")
    wordpieces().save(tmp_path / "parts")
    with pytest.raises(UserError, match="which is no tag"):
        load_tagger(tmp_path / "parts", device="cpu")


@pytest.mark.parametrize("what", ["text", "shape", "unit"])
def test_a_damaged_chain(what: str, tagger: Path, tmp_path: Path) -> None:
    shutil.copytree(tagger, tmp_path / "run")
    path = tmp_path / "run" / FILE
    about = {"unit": "token", "twice": "False", "max_length": "64", "overlap": "0.25"}
    if what == "text":
        path.write_bytes(b"nothing")
    elif what == "shape":
        save_file({"start": torch.zeros(2)}, path, about)
    else:
        save_file({}, path, {**about, "unit": "letter"})
    with pytest.raises(UserError, match=rf"{FILE} is damaged"):
        load_tagger(tmp_path / "run", device="cpu")


def test_evaluation_says_nothing_of_the_models_mode(folders: dict[str, str]) -> None:
    method, model, items = opened(folders["encoder"], sentences(4))
    assert isinstance(model, nn.Module)
    model.train()
    rows = [Row(row, f"rows:{n}") for n, row in enumerate(sentences(4))]
    first = method.evaluate(model, rows, items, LiveLine(quiet=True))
    assert model.training
    again = method.evaluate(model.eval(), rows, items, LiveLine(quiet=True))
    assert first.figures == again.figures  # no dropout while names are sought
    assert not model.training
