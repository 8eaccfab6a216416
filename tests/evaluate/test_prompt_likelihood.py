"""Labels by their likelihood: equal to the plain sum, whatever is shared, batched or cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.evaluate import prompt_likelihood as p
from llm_from_scratch.evaluate.prompt_likelihood import PromptClassifier, PromptSettings, Shot
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.assemble import Model
from llm_from_scratch.weights.sources import load
from tests.train.tiny_folders import decoder_folder, encoder_decoder_folder, encoder_folder

Tiny = tuple[Model, Tokenizer]
SHOTS = [Shot("the cat sat", "good"), Shot("a mat sang", "not so good")]
QUESTIONS = [Shot(text) for text in ("on a mat", "she saw", "the cat " * 3, "it was", "so")]
LABELS = ["good", "not so good", "red"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return load(decoder_folder(tmp_path_factory.mktemp("tiny") / "decoder"), device="cpu")


def plainly(model: Model, tokenizer: Tokenizer, prompt: str, label: str) -> tuple[float, int]:
    """log p(label | prompt), token by token from the whole row."""
    given, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + label)
    assert whole[: len(given)] == given
    with torch.no_grad():
        logprobs = model(torch.tensor([whole]))[0].double().log_softmax(-1)
    places = range(len(given), len(whole))
    return sum(float(logprobs[at - 1, whole[at]]) for at in places), len(places)


@pytest.mark.parametrize("normalise", p.NORMALISE)
@pytest.mark.parametrize("shots", [[], SHOTS])
def test_the_plain_sum(writer: Tiny, normalise: str, shots: list[Shot]) -> None:
    model, tokenizer = writer
    template = "{text}:{label}"
    settings = PromptSettings(template, normalise)
    asked = PromptClassifier(model, tokenizer, LABELS, shots, settings)
    got = asked.predict(QUESTIONS)
    before = "".join(f"{shot.text}:{shot.label}\n\n" for shot in shots)
    for question, row in zip(QUESTIONS, got, strict=True):
        wanted = []
        for label in LABELS:
            total, tokens = plainly(model, tokenizer, f"{before}{question.text}:", label)
            size = {"token": tokens, "byte": len(label), "none": 1}[normalise]
            wanted.append(total / size)
        torch.testing.assert_close(
            torch.tensor(row), torch.tensor(wanted).softmax(-1), atol=1e-5, rtol=1e-4
        )


def test_batches_and_pages_change_nothing(writer: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = PromptClassifier(*writer, LABELS, SHOTS)
    whole = asked.predict(QUESTIONS)
    for tokens, page in ((1, 16), (40, 4), (10_000, 1)):
        monkeypatch.setattr(p, "TOKENS_AT_ONCE", tokens)
        monkeypatch.setattr(p, "PAGE", page)
        assert torch.allclose(torch.tensor(whole), torch.tensor(asked.predict(QUESTIONS)))
    alone = [asked.predict([question])[0] for question in QUESTIONS]
    assert torch.allclose(torch.tensor(whole), torch.tensor(alone))
    assert asked.predict([]) == []


def test_labels_of_one_token_share_a_row(writer: Tiny) -> None:
    model, tokenizer = writer
    labels = [c for c in "abcdef" if len(tokenizer.encode(c)) == 1]
    asked = PromptClassifier(model, tokenizer, labels, (), PromptSettings("{text} = {label}"))
    rows = asked._rows(Shot("1 2"), 0)
    assert len(rows) == 1 or any(len(tail) > 1 for row in rows for tail in row.tails)
    got = asked.predict([Shot("1 2")])[0]
    assert sum(got) == pytest.approx(1)


def test_calibration_evens_out_what_says_nothing(writer: Tiny) -> None:
    settings = PromptSettings(calibrate=True)
    asked = PromptClassifier(*writer, LABELS, (), settings)
    plain = PromptClassifier(*writer, LABELS, ())
    empty = [Shot(text, pair=text) for text in p.NOTHING]
    mean = torch.tensor(plain.predict(empty)).mean(0)
    one = torch.tensor(plain.predict(QUESTIONS)) / mean
    wanted = one / one.sum(-1, keepdim=True)
    assert torch.allclose(torch.tensor(asked.predict(QUESTIONS)), wanted.float(), atol=1e-6)


def test_encoder_decoders_write_the_label(tmp_path: Path) -> None:
    model, tokenizer = load(encoder_decoder_folder(tmp_path / "tiny"), device="cpu")
    settings = PromptSettings("{text} and {label}", "none")
    got = PromptClassifier(model, tokenizer, LABELS, (), settings).predict(QUESTIONS)
    source = tokenizer.encode_inputs(["on a mat and"]).ids
    wanted = []
    for label in LABELS:
        tail = tokenizer.encode(label)
        ids = torch.tensor([[model.config.start_id, *tail[:-1]]])  # type: ignore[union-attr]
        with torch.no_grad():
            logprobs = model(torch.tensor(source), ids)[0].log_softmax(-1)
        wanted.append(sum(float(logprobs[at, token]) for at, token in enumerate(tail)))
    assert torch.allclose(torch.tensor(got[0]), torch.tensor(wanted).softmax(-1), atol=1e-5)
    assert not any(math.isnan(value) for row in got for value in row)


def test_labels_by_other_words(writer: Tiny) -> None:
    plain = PromptClassifier(*writer, LABELS, SHOTS).predict(QUESTIONS)
    shots = [Shot("the cat sat", "0"), Shot("a mat sang", "1")]
    named = PromptClassifier(*writer, ["0=good", "1 = not so good", "2=red"], shots)
    assert named.labels == ["0", "1", "2"]
    assert named.predict(QUESTIONS) == plain


def test_braces_in_a_text_mean_nothing() -> None:
    shot = Shot("a {label} {0.__class__}", "good", "{text}")
    assert p.fill("{text}|{pair}|{label}", shot) == "a {label} {0.__class__}|{text}|good"


def test_what_cannot_be(writer: Tiny, tmp_path: Path) -> None:
    model, tokenizer = writer
    for labels, shots, said in (
        (["a"], [], "at least two"),
        (["a", "a"], [], "must be different"),
        (["0=a", "1=a"], [], "must be different"),
        (["a", " "], [], "not empty"),
        (["a", "b"], SHOTS, "Shot 1 has the label 'good', which is none of a, b"),
    ):
        with pytest.raises(UserError, match=said):
            PromptClassifier(model, tokenizer, labels, shots)
    with pytest.raises(UserError, match=r"Text 2 makes a prompt of \d+ tokens, more than"):
        PromptClassifier(model, tokenizer, ["a", "b"]).predict([Shot("x"), Shot("the cat " * 90)])
    for settings, said in (
        ({"template": "{text} is"}, "needs {text}, and {label} at its end"),
        ({"template": "is {label}"}, "needs {text}"),
        ({"normalise": "tokens"}, "one of token, byte, none"),
    ):
        with pytest.raises(UserError, match=said):
            PromptSettings(**settings)
    encoder, pieces = load(encoder_folder(tmp_path / "e"), device="cpu")
    with pytest.raises(UserError, match="a model that writes"):
        PromptClassifier(encoder, pieces, ["a", "b"])
