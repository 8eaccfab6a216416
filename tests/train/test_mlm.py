"""finetune mlm: what is hidden, equality with transformers, exactness, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from llm_from_scratch.core.config import from_dict, merge
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.records import BadRows
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.train.finetune import finetune
from llm_from_scratch.train.masking import Masking, goes_on, masking_for
from llm_from_scratch.train.methods.mlm import MaskedBatch, Mlm, MlmConfig, passages
from llm_from_scratch.train.run import Run
from llm_from_scratch.weights.folder import load_folder
from llm_from_scratch.weights.sources import load
from tests.model.references_heads import make_headed
from tests.train.helpers import text
from tests.train.test_classify import their_gradients
from tests.train.tiny_folders import byte_pairs, decoder_folder, encoder_folder, wordpieces

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return wordpieces()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return encoder_folder(tmp_path_factory.mktemp("tiny") / "encoder")


# --- what is hidden ------------------------------------------------------------------------------


def test_shares(tokenizer: Tokenizer) -> None:
    masking = masking_for(tokenizer, 0.15, False)
    row = tokenizer.encode_inputs([text(60)]).ids[0]
    plain = len(row) - 2
    asked = hidden = false = 0
    for number in range(300):
        seen, targets = masking.hide(row, 5, number)
        places = [at for at, target in enumerate(targets) if target != IGNORED]
        assert len(places) == round(0.15 * plain)
        assert 0 not in places and len(row) - 1 not in places  # [CLS], [SEP]
        assert all(targets[at] == row[at] for at in places)
        assert all(seen[at] == row[at] for at in range(len(row)) if at not in places)
        assert all(0 <= token < tokenizer.vocab_size for token in seen)
        asked += len(places)
        hidden += sum(seen[at] == tokenizer.mask_id for at in places)
        false += sum(seen[at] not in (tokenizer.mask_id, row[at]) for at in places)
    assert hidden / asked == pytest.approx(0.8, abs=0.03)
    assert false / asked == pytest.approx(0.1, abs=0.03)


def test_what_is_hidden_depends_on_the_number_alone(tokenizer: Tokenizer) -> None:
    masking = masking_for(tokenizer, 0.3, False)
    row = tokenizer.encode_inputs([text(30)]).ids[0]
    assert masking.hide(row, 1, 7) == masking.hide(row, 1, 7)
    assert masking.hide(row, 1, 7) != masking.hide(row, 1, 8)
    assert masking.hide(row, 1, 7) != masking.hide(row, 2, 7)
    short = tokenizer.encode_inputs(["cat"]).ids[0]
    assert sum(t != IGNORED for t in masking.hide(short, 1, 1)[1]) >= 1
    assert masking.hide([tokenizer.cls_id or 0], 1, 1)[1] == [IGNORED]  # nothing to ask for


def test_whole_words() -> None:
    """Tokens 10.. begin a word, 20.. go on with it, 0 is special."""
    special, later = np.zeros(30, bool), np.zeros(30, bool)
    special[0], later[20:] = True, True
    masking = Masking(0.3, True, 1, np.arange(10, 30), special, later)
    row = [0, 10, 20, 21, 11, 12, 22, 13, 14, 15, 23, 0]
    words = [[1, 2, 3], [4], [5, 6], [7], [8], [9, 10]]
    sizes = set()
    for number in range(60):
        targets = masking.hide(row, 0, number)[1]
        asked = {at for at, target in enumerate(targets) if target != IGNORED}
        assert all(set(word) <= asked or not set(word) & asked for word in words)
        sizes.add(len(asked))
    assert sizes == {3}  # 30 % of ten tokens
    long = [10, *[20] * 20]
    assert [len(word) for word in masking.words(np.array(long), np.arange(21))] == [8, 8, 5]


def test_what_goes_on_with_a_word() -> None:
    assert goes_on("##s", "wordpiece") and not goes_on("s", "wordpiece")
    for begin in ("Ġcat", "▁cat", ".", "Ċ", ""):
        assert not goes_on(begin, "bpe") or begin == "Ċ"
    assert goes_on("cat", "bpe") and goes_on("cat", "unigram")


# --- the same as transformers --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert"])
def test_loss_and_gradients_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = make_headed(family, "masked_lm").eval()
    theirs.save_pretrained(tmp_path / "model")
    ours, _ = load_folder(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (4, 20), generator=generator)
    mask = (torch.arange(20) < torch.tensor([[20], [11], [17], [3]])).long()
    asked = (torch.rand(4, 20, generator=generator) < 0.3) & mask.bool()
    targets = torch.where(asked, torch.randint(5, 60, (4, 20), generator=generator), IGNORED)
    result = Mlm(MlmConfig()).step(ours, MaskedBatch(tokens, mask, targets))
    (result.loss_sum / result.count).backward()
    assert result.count == int(asked.sum()) and result.tokens == int(mask.sum())
    loss = theirs(tokens, attention_mask=mask, labels=targets).loss
    loss.backward()
    torch.testing.assert_close(result.loss_sum / result.count, loss, rtol=1e-5, atol=1e-6)
    for parameter in theirs.parameters():
        if parameter.grad is None:  # a bias that is stored and not in use
            parameter.grad = torch.zeros_like(parameter)
    wanted = their_gradients(theirs, tmp_path / "gradients")
    largest = max(float(p.grad.abs().max()) for p in ours.parameters())
    for name, parameter in ours.named_parameters():
        error = float((parameter.grad - wanted[name].detach()).abs().max())
        assert error <= 1e-5 * largest, name


# --- runs ----------------------------------------------------------------------------------------


def run_on(out: Path, folder: str, **changes: Any) -> Run:
    source = out.parent / "texts.txt"
    lines = text(3000).split(" ")
    source.write_text("\n".join(" ".join(lines[i : i + 25]) for i in range(0, 3000, 25)), "utf-8")
    base: dict[str, Any] = {
        "model": folder,
        "out": str(out),
        "data": {"paths": [str(source)], "drop_duplicates": False, "test_fraction": 0.2},
        "train": {
            "max_steps": 30, "epochs": None, "batch_size": 8, "learning_rate": 3e-3,
            "precision": "fp32", "device": "cpu", "eval_every": 10, "checkpoint_every": 10,
        },
    }  # fmt: skip
    return finetune("mlm", from_dict(MlmConfig, merge(base, changes)), quiet=True)


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_run_learns(
    whole_words: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_from_scratch.train.methods.mlm.PASSAGE", 400)
    run = run_on(tmp_path / "run", folder, mlm={"whole_words": whole_words})
    assert run.summary["test_perplexity"] < 0.6 * run.summary["base_test_perplexity"]
    assert run.summary["test_guesses"] > 20
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "## Most confident errors" in report and "MASK" in report
    back = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model").eval()
    model, tokenizer = load(str(tmp_path / "run"), device="cpu")
    ids = torch.tensor(tokenizer.encode_inputs(["the cat [MASK] on a mat"], special=True).ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), back(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stop", [2, 9])
def test_a_resumed_run_is_the_straight_one(
    stop: int, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_from_scratch.train.methods.mlm.PASSAGE", 400)
    train = {"max_steps": 12, "eval_every": 5}
    run_on(tmp_path / "a", folder, train=train)
    assert run_on(tmp_path / "b", folder, train={**train, "stop_after": stop}).interrupted
    finetune("mlm", MlmConfig(out=str(tmp_path / "b")), resume=True, quiet=True)
    a, b = (load_file(tmp_path / x / "checkpoints" / "step-12" / "model.safetensors") for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_size_of_batches_changes_nothing(folder: str) -> None:
    method = Mlm(from_dict(MlmConfig, {"model": folder, "train": {"device": "cpu"}}))
    model = method.open()
    model.eval()
    items = [method.encode({"text": text(5 + 6 * n, n)}) for n in range(5)]
    source = method.source(items)
    assert method.sequences(items) == 5 == len(source)

    def gradients(sizes: list[int]) -> list[torch.Tensor]:
        model.zero_grad()
        start = 0
        for size in sizes:
            method.step(model, source.batch(start, size)).loss_sum.backward()
            start += size
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, parts = gradients([10]), gradients([1, 3, 4, 2])
    largest = max(float(g.abs().max()) for g in whole)
    assert max(float((a - b).abs().max()) for a, b in zip(whole, parts, strict=True)) <= (
        1e-6 * largest
    )
    first, second = source.batch(0, 5), source.batch(5, 5)
    assert not torch.equal(first.targets.sort()[0][:, -3:], second.targets.sort()[0][:, -3:])


# --- texts ---------------------------------------------------------------------------------------


def test_windows_hold_everything(folder: str) -> None:
    method = Mlm(
        from_dict(
            MlmConfig, {"model": folder, "data": {"max_length": 16}, "train": {"device": "cpu"}}
        )
    )
    method.open()
    long = text(50)
    windows = method.encode({"text": long})
    tokenizer = method.tokenizer
    assert all(len(window) <= 16 for window in windows)
    assert all(w[0] == tokenizer.cls_id and w[-1] == tokenizer.sep_id for w in windows)
    assert [i for window in windows for i in window[1:-1]] == tokenizer.encode(long)
    assert max(map(len, windows)) - min(map(len, windows)) <= 1


def test_errors_are_shown_without_padding(folder: str) -> None:
    method = Mlm(from_dict(MlmConfig, {"model": folder, "train": {"device": "cpu"}}))
    method.open()
    long, short = (method.encode({"text": text(n, 1)})[0] for n in (60, 30))
    batch = method.collate([(long, 0), (short, 1)])
    padding = method.tokenizer.decode([0])
    assert padding and len(long) > len(short) + 10
    batch.targets[1].fill_(IGNORED)
    batch.targets[1, len(short) - 1] = short[-1]  # the last word, behind which padding stands
    said = torch.where(batch.targets == IGNORED, IGNORED, 1)
    (mistake,) = method._mistakes(["a", "b"], batch, said, torch.ones(said.shape))[-1:]
    assert mistake.place == "b" and padding not in mistake.text and "MASK" in mistake.text


def test_passages() -> None:
    lines = [f"line {n} " + "x" * (n % 30) for n in range(100)]
    whole = "\n".join(lines)
    parts = passages(whole, 200)
    assert "\n".join(parts) == whole
    assert max(map(len, parts)) <= 201
    assert passages("x" * 500, 200) == ["x" * 500]
    assert passages("a\n" + "x" * 500 + "\nb", 200) == ["a", "x" * 500, "b"]


def test_tables_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("ham\tthe cat sat\nspam\ta mat\tmore\nalone\n", encoding="utf-8")

    def read(columns: list[str], **settings: str) -> tuple[list[str], list[str]]:
        values = {"data": {"columns": columns}, "mlm": settings}
        bad = BadRows()
        found = list(Mlm(from_dict(MlmConfig, values)).read(str(path), bad))
        return [row.values["text"] for row in found], bad.sentences

    texts, bad = read(["label", "text"])
    assert texts == ["the cat sat", "a mat"]
    assert bad == [f"{path}:3: has 1 columns, 'text' is number 2."]
    assert read(["words", "said"], text_field="words")[0] == ["ham", "spam", "alone"]
    with pytest.raises(UserError, match=r"--data\.columns names no 'text' but label, texts"):
        read(["label", "texts"])


def test_models_that_cannot(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class of llama with a head for masked_lm"):
        run_on(tmp_path / "run", decoder_folder(tmp_path / "decoder"))
    with pytest.raises(UserError, match="no mask token"):
        masking_for(byte_pairs(), 0.15, False)
    with pytest.raises(UserError, match=r"mlm.share is 1.0"):
        from_dict(MlmConfig, {"mlm": {"share": 1}})
