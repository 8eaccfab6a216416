"""Texts for texts: losses beside `transformers`, and whole runs of tiny models."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llm_from_scratch.core.config import from_dict
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine, read_json
from llm_from_scratch.data.records import BadRow, Row
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.lora import LoraSettings
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.text.inputs import template
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.train.finetune import finetune
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.methods.seq2seq import Pair, Seq2Seq, Seq2SeqConfig
from llm_from_scratch.weights.folder import load_folder, save_folder
from tests.model.references_seq2seq import make_seq2seq

WORDS = "apple bread chair dance eagle flame grape house".split()
KINDS = ("decoder", "t5", "bart")


def made_tokenizer(ends: bool) -> Tokenizer:
    """Each word a token; with `ends` the end token is put behind every text, as T5 does it."""
    made = train_tokenizer([" ".join(WORDS) + " TL;DR:\n\n"] * 40, vocab_size=330)
    if not ends:
        return made
    assert made.eos_id is not None
    end = str(made.tokens[made.eos_id])
    around = template("A eos", "A eos B eos", {"eos": end}, {end: made.eos_id}, False)
    return Tokenizer.from_spec({**made.spec, "post_processor": around}, made.config)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a decoder and of encoder-decoders, none of which was ever trained."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = made_tokenizer(kind != "decoder")
        model: Decoder | EncoderDecoder
        if kind == "decoder":
            settings = ModelSettings(d_model=48, n_layers=2, n_heads=4, n_kv_heads=2)
            model = Decoder(resolve(settings, tokenizer.vocab_size, 96))
            model.initialise(1)
        else:
            end = tokenizer.eos_id
            changes: dict[str, Any] = {"eos_token_id": end, "dropout_rate": 0.0}
            if kind == "bart":
                off = ("dropout", "attention_dropout", "activation_dropout")
                changes = {"forced_eos_token_id": end, **dict.fromkeys(off, 0.0)}
            make_seq2seq(
                kind, vocab_size=tokenizer.vocab_size, decoder_start_token_id=end, **changes
            ).save_pretrained(folder)
            loaded, _ = load_folder(folder)
            assert isinstance(loaded, EncoderDecoder)
            model = loaded
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.2 if "embedding" in name else 0.1)
                    else:
                        parameter.fill_(float("norm.weight" in name))
        save_folder(model, tokenizer, folder / "model")
        found[kind] = str(folder / "model")
    return found


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """The wanted text is the one of the first three words that stands somewhere among others."""
    draw = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        key, rest = draw.choice(WORDS[:3]), draw.sample(WORDS[3:], draw.randint(1, 3))
        rest.insert(draw.randint(0, len(rest)), key)
        rows[" ".join(rest)] = key
    return [{"text": text, "title": key} for text, key in rows.items()]


def config(model: str, file: str = "", out: Path | None = None, **parts: Any) -> Seq2SeqConfig:
    train = {
        "epochs": None, "max_steps": 6, "batch_size": 4, "device": "cpu", "precision": "fp32",
        "eval_every": 3, "checkpoint_every": 3, "seed": 1, "learning_rate": 5e-3,
        "warmup_steps": 2, **parts.get("train", {}),
    }  # fmt: skip
    values = {
        "model": model, "out": str(out or ""), "train": train,
        "data": {"paths": [file], "drop_duplicates": False, **parts.get("data", {})},
        "seq2seq": {"num_beams": 2, "max_target": 8, **parts.get("seq2seq", {})},
    }  # fmt: skip
    return from_dict(Seq2SeqConfig, values)


def opened(model: str, **seq2seq: Any) -> tuple[Seq2Seq, Any]:
    method = Seq2Seq(config(model, seq2seq=seq2seq))
    return method, method.open()


def encoded(method: Seq2Seq, rows: list[dict[str, str]]) -> list[Pair]:
    return [method.encode(method.check(row)) for row in rows]


# --- beside the reference library ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_transformers(
    kind: str, models: dict[str, str], tmp_path: Path
) -> None:
    method, ours = opened(models[kind])
    ours.eval()
    items = encoded(method, pairs(5))
    batch: Any = method.collate(items)
    result = method.step(ours, batch)
    (result.loss_sum / result.count).backward()
    if kind == "decoder":
        theirs = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32).eval()
        longest = max(map(len, items))
        ids = torch.zeros(len(items), longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, item in enumerate(items):
            whole = torch.tensor([*item.source, *item.target])
            ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
            labels[row, len(item.source) : len(whole)] = whole[len(item.source) :]
        loss = theirs(ids, attention_mask=mask, labels=labels).loss
    else:
        theirs = AutoModelForSeq2SeqLM.from_pretrained(models[kind], dtype=torch.float32).eval()
        theirs.config.pad_token_id = theirs.config.decoder_start_token_id  # stands for -100
        loss = theirs(batch.source, attention_mask=batch.source_mask, labels=batch.labels).loss
    loss.backward()
    assert (result.loss_sum / result.count).item() == pytest.approx(loss.item(), rel=1e-5)
    # Their gradients under our names: a model folder whose weights are gradients.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path)
    wanted = dict(load_folder(tmp_path)[0].named_parameters())
    largest = max(p.abs().max().item() for p in wanted.values())
    assert largest > 1e-3
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            gap = (parameter.grad - wanted[name]).abs().max().item()
            assert gap <= 1e-5 * max(1.0, largest), name


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing(kind: str, models: dict[str, str]) -> None:
    found = []
    for micro in (8, 3, 1):
        method, model = opened(models[kind])
        settings = dataclasses.replace(
            method.config.train, batch_size=8, micro_batch_size=micro, max_steps=1
        )
        source = method.source(encoded(method, pairs(8)))
        loop = Loop(model, method, source, settings, device=torch.device("cpu"), quiet=True)
        sums = loop.gradients(0)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((sums.loss, sums.tokens, grads))
    for loss, tokens, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6) and tokens == found[0][1]
        largest = max(g.abs().max().item() for g in found[0][2].values())
        for name, gradient in grads.items():
            assert (gradient - found[0][2][name]).abs().max().item() <= 1e-6 * largest, name


def test_tokens_are_counted_without_padding(models: dict[str, str]) -> None:
    for kind in ("decoder", "t5"):
        method, model = opened(models[kind])
        items = encoded(method, pairs(6))
        result = method.step(model, method.collate(items))
        assert result.count == sum(len(item.target) for item in items)
        read = sum(len(item) - (kind == "decoder") for item in items)
        assert result.tokens == read


# --- what is read and written --------------------------------------------------------------------


def test_a_decoder_reads_the_template_and_learns_the_target(models: dict[str, str]) -> None:
    method, _ = opened(models["decoder"])
    tokenizer = method.tokenizer
    pair = method.encode(method.check({"source": "apple bread", "target": " grape "}))
    source, target = pair.source, pair.target
    assert tokenizer.decode(source) == "apple bread\n\nTL;DR:"
    assert tokenizer.decode(target[:-1]) == " grape" and target[-1] == tokenizer.eos_id
    # As if it were one text: nothing is cut differently than in what the model learnt from.
    assert [*source, *target[:-1]] == tokenizer.encode("apple bread\n\nTL;DR: grape")
    batch: Any = method.collate([pair, Pair(source[:2], target)])
    assert batch.tokens.tolist()[0] == [*source, *target[:-1]]
    assert batch.targets.tolist()[0] == [-100] * (len(source) - 1) + target
    own, _ = opened(models["decoder"], template="Q {source} A {target}")
    pair = own.encode(own.check({"source": "x", "target": "y"}))
    assert tokenizer.decode(pair.source) == "Q x A" and tokenizer.decode(pair.target[:-1]) == " y"


def test_an_encoder_decoder_reads_the_source_with_its_end(models: dict[str, str]) -> None:
    for kind in ("t5", "bart"):
        method, _ = opened(models[kind], template="summarize: {source}")
        end = method.tokenizer.eos_id
        pair = method.encode(method.check({"source": "apple", "target": "grape"}))
        source, target = pair.source, pair.target
        assert source[-1] == target[-1] == end and target.count(end) == 1
        assert method.tokenizer.decode(source[:-1]) == "summarize: apple"


def test_a_target_begins_with_the_token_that_it_is_made_to_begin_with(
    models: dict[str, str],
) -> None:
    method, model = opened(models["bart"])
    model.config = dataclasses.replace(model.config, first_id=7)
    assert method._target("grape")[0] == 7
    assert method._target("grape").count(7) == 1


def test_sources_are_cut_only_if_they_may_be(models: dict[str, str]) -> None:
    long = {"source": " ".join(WORDS * 20), "target": "apple"}
    for kind, room in (("decoder", 96 - 8), ("bart", 48)):
        method, _ = opened(models[kind])
        with pytest.raises(BadRow, match=f"tokens in its source, more than {room}; shorten it"):
            method.encode(method.check(long))
        method, _ = opened(models[kind], cut_sources=True)
        source = method.encode(method.check(long)).source
        assert len(source) == room
        text = method.tokenizer.decode(source, skip_special=True)
        assert text.startswith("apple bread chair")
        assert text.endswith("TL;DR:") == (kind == "decoder")


def test_known_names_of_fields_are_found_and_others_can_be_named(models: dict[str, str]) -> None:
    method = Seq2Seq(config(models["t5"]))
    row = {"id": 5, "article": " A. ", "highlights": " B. "}
    assert method.check(row) == {"source": "A.", "targets": ["B."]}
    both = {"source": "x", "target": ["y", "z", "y"], "text": "no"}
    assert method.check(both) == {"source": "x", "targets": ["y", "z"]}
    named = {"source_field": "id", "target_field": "text"}
    assert Seq2Seq(config(models["t5"], seq2seq=named)).check(
        {"id": "a", "text": "b", "source": "c", "target": "d"}
    ) == {"source": "a", "targets": ["b"]}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"title": "a", "url": "b"}, r"no known pair of fields \(it has 'title', 'url'\): name"),
        ({"source": "a", "target": "  "}, "has an empty 'target'; fill it"),
        ({"source": "", "target": "b"}, "has an empty 'source'; fill it"),
        ({"source": "a", "target": []}, "has an empty 'target'; fill it"),
        ({"source": 3, "target": "b"}, "has 3 for 'source', which is no text"),
        ({"source": "a", "target": "grape " * 9}, "a target of 10 tokens, more than 8; shorten"),
    ],
)
def test_bad_rows_are_named(
    row: dict[str, Any], sentence: str, models: dict[str, str], tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", [*pairs(3), row])
    with pytest.raises(UserError, match=f"rows.jsonl:4: .*{sentence}"):
        finetune("seq2seq", config(models["t5"], data, tmp_path / "run", data={"on_bad": "stop"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        ("t5", {"template": "a"}, r"must have \{source\} once"),
        ("t5", {"template": "{source} {target}"}, "reads the source alone"),
        ("decoder", {"template": "{source}"}, r"for a decoder it must end with \{target\}"),
        ("decoder", {"template": "{target} {source}"}, "must end with"),
        ("decoder", {"max_target": 96}, "room for 96 tokens"),
        ("t5", {"metrics": ["rogue"]}, r"seq2seq.metrics has 'rogue'.*Did you mean 'rouge'"),
        ("t5", {"language": "jp"}, "seq2seq.language is 'jp'"),
        ("t5", {"source_field": "a"}, "belong together"),
        ("t5", {"num_beams": 0}, "num_beams is 0"),
        ("t5", {"max_target": 1}, "max_target is 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    kind: str, settings: dict[str, Any], sentence: str, models: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=sentence):
        opened(models[kind], **settings)


def test_a_reader_is_no_writer(data_dir: Path, tmp_path: Path) -> None:
    folder = Path.home() / ".cache" / "scratchlm-test" / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        pytest.skip("no encoder here")
    with pytest.raises(UserError, match="writes none"):
        opened(str(folder))


# --- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "t5"])
def test_a_run_learns_and_reports(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [*pairs(150), {"text": "no title"}])
    wishes = config(
        models[kind], data, tmp_path / "run", train={"max_steps": 100, "batch_size": 16,
        "eval_every": 50, "learning_rate": 3e-3, "warmup_steps": 5}, seq2seq={"eval_rows": 10},
    )  # fmt: skip
    summary = finetune("seq2seq", wishes, quiet=True).summary
    assert summary["test_rouge1"] >= 0.8 > 0.3 > summary["base_test_rouge1"]
    assert summary["test_exact_match"] >= 0.8 and summary["test_written_rows"] == 10
    assert summary["test_chrf"] > 60 and summary["skipped_rows"] == 1
    assert "rows.jsonl:151: has no known pair" in (tmp_path / "run/data/skipped.txt").read_text()
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    for title in ("Training texts", "Lengths of the texts", "Sureness", "Surest of the worst"):
        assert title in report
    before = read_json(tmp_path / "run" / "before.json")
    assert len(before["examples"]) == 10
    # The reference library takes the result, and writes the same.
    kinds = {"decoder": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
    theirs = kinds[kind].from_pretrained(tmp_path / "run" / "model", dtype=torch.float32).eval()
    method, _ = opened(str(tmp_path / "run" / "model"))
    prompt = method._prompt("grape apple house")
    written = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False, max_new_tokens=4, eos_token_id=method.tokenizer.eos_id, pad_token_id=0,
    )[0].tolist()  # fmt: skip
    new = written[len(prompt) :] if kind == "decoder" else written[1:]
    assert method.tokenizer.decode(new, skip_special=True).strip() == "apple"


@pytest.mark.parametrize("kind", ["decoder", "t5"])
def test_a_resumed_run_is_the_straight_one(
    kind: str, models: dict[str, str], tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", pairs(30))
    straight = finetune("seq2seq", config(models[kind], data, tmp_path / "a"), quiet=True)
    stopped = config(models[kind], data, tmp_path / "b", train={"stop_after": 2})
    assert finetune("seq2seq", stopped, quiet=True).interrupted
    resumed = finetune("seq2seq", Seq2SeqConfig(out=str(tmp_path / "b")), resume=True, quiet=True)
    a, b = (
        load_file(tmp_path / name / "checkpoints" / "step-6" / "model.safetensors") for name in "ab"
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    kept = {name for name in straight.summary if "second" not in name}
    assert all(straight.summary[name] == resumed.summary[name] for name in kept)


@pytest.mark.parametrize("kind", ["decoder", "t5"])
def test_adapters_learn_it_too(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    wishes = config(models[kind], write(tmp_path / "rows.jsonl", pairs(20)), tmp_path / "run")
    low = dataclasses.replace(wishes, lora=LoraSettings(rank=2))
    summary = finetune("seq2seq", low, quiet=True).summary
    assert 0 < summary["trainable_parameters"] < summary["parameters"] / 2
    _, model = opened(str(tmp_path / "run" / "model"))
    _, base = opened(models[kind])
    changed = [n for n, p in base.named_parameters() if not torch.equal(p, model.state_dict()[n])]
    assert changed and not any("embedding" in name or "norm" in name for name in changed)


def test_japanese_is_measured_by_words(models: dict[str, str], tmp_path: Path) -> None:
    method, model = opened(models["decoder"], max_target=60)
    method.config = dataclasses.replace(
        method.config, seq2seq=dataclasses.replace(method.config.seq2seq, num_beams=1)
    )
    rows = [Row(method.check({"source": "吾輩は猫だ", "target": "猫だ"}), "a.jsonl:1")]
    method.learn(rows)
    assert method.language == "ja"
    found = method.evaluate(
        model.eval(), rows, [method.encode(rows[0].values)], LiveLine(quiet=True)
    )
    assert {"rouge1", "rougeL", "bleu", "chrf", "exact_match"} <= set(found.figures)
    assert found.examples[0]["wanted"] == "猫だ"
    assert "language: ja" in found.sections[0].text
