"""Best-of-n and self-consistency: the arithmetic by hand, and a model that is right most times."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm_from_scratch.cli.main import run
from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.evaluate.choosing import RewardModel, found_by, number_in
from llm_from_scratch.generate.best_of import (
    Candidate,
    Likelihood,
    best_of,
    consensus,
    draw,
    draw_replies,
    each,
    ranked,
    self_consistency,
)
from llm_from_scratch.generate.chat import LocalChat
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.weights.folder import save_folder
from llm_from_scratch.weights.sources import load

# Three ways in five lead to 42, and the likeliest single text is wrong.
SAYINGS = ["so 42.", "thus 42.", "it is 42.", "oh 7.", "oh 7."]
PROMPT = "6 times 7:"


@pytest.fixture(scope="module")
def reasoner() -> tuple[Decoder, Tokenizer]:
    tokenizer = train_tokenizer([" ".join([PROMPT, *SAYINGS]) * 20], vocab_size=290)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2,
        head_dim=16, d_ff=64, max_seq_len=40,
    )  # fmt: skip
    model = Decoder(config)
    model.initialise(seed=0)
    rows = [tokenizer.encode(f"{PROMPT} {saying}") for saying in SAYINGS]
    longest = max(map(len, rows)) + 1
    tokens = torch.full((len(rows), longest), -100)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids) + 1] = torch.tensor([*ids, tokenizer.eos_id])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        logits = model(tokens[:, :-1].clamp(min=0))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def folder(reasoner: tuple[Decoder, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("models") / "reasoner"
    save_folder(*reasoner, path)
    return str(path)


def logprob_of(model: Decoder, tokenizer: Tokenizer, prompt: str, text: str) -> float:
    start = len(tokenizer.encode(prompt))
    ids = tokenizer.encode(prompt + text)
    with torch.no_grad():
        told = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return sum(told[place - 1, ids[place]].item() for place in range(start, len(ids)))


# --- drawing and scoring -------------------------------------------------------------------------


def test_candidates_know_how_likely_they_are(reasoner: tuple[Decoder, Tokenizer]) -> None:
    model, tokenizer = reasoner
    drawn = draw(model, tokenizer, PROMPT, 12, seed=1, temperature=1.0)
    assert len(drawn) == 12 and len({one.text for one in drawn}) > 2
    assert drawn == draw(model, tokenizer, PROMPT, 12, seed=1, temperature=1.0)
    for one in drawn[:4]:
        expected = logprob_of(model, tokenizer, PROMPT, one.text)
        assert one.finish_reason == "stop"
        assert one.logprob == pytest.approx(expected, abs=1e-4)
        assert one.tokens == len(tokenizer.encode(PROMPT + one.text)) - len(
            tokenizer.encode(PROMPT)
        )


def test_likelihood_is_the_mean_or_the_sum() -> None:
    some = [Candidate("a", tokens=4, logprob=-2.0), Candidate("b", tokens=1, logprob=-1.0),
            Candidate("", tokens=0, logprob=0.0)]  # fmt: skip
    assert Likelihood()("", some) == [-0.5, -1.0, -math.inf]
    assert Likelihood(0.0)("", some) == [-2.0, -1.0, -math.inf]
    assert [one.text for one in ranked("", some, Likelihood())] == ["a", "b", ""]
    assert [one.text for one in ranked("", some, Likelihood(0.0))] == ["b", "a", ""]
    with pytest.raises(UserError, match="was not told"):
        ranked("", [Candidate("a")], Likelihood())


def test_the_best_by_a_function_of_your_own(reasoner: tuple[Decoder, Tokenizer]) -> None:
    model, tokenizer = reasoner
    seen = []

    def short(prompt: str, text: str) -> float:
        seen.append(prompt)
        return -len(text)

    best = best_of(model, tokenizer, PROMPT, 16, each(short), seed=3, temperature=1.0)
    drawn = draw(model, tokenizer, PROMPT, 16, seed=3, temperature=1.0)
    assert len(best.text) == min(len(one.text) for one in drawn) and best.score == -len(best.text)
    assert set(seen) == {PROMPT} and len(seen) == 16
    # Without one: the likeliest of them per token.
    likely = best_of(model, tokenizer, PROMPT, 16, seed=3, temperature=1.0)
    assert likely.score == max(one.logprob / one.tokens for one in drawn)


def test_equal_scores_leave_the_order() -> None:
    some = [Candidate(text) for text in "abc"]
    assert ranked("", some, each(lambda prompt, text: 0.0)) == [
        replace(one, score=0.0) for one in some
    ]
    with pytest.raises(RunError, match="gave no number"):
        ranked("", some, each(lambda prompt, text: math.nan))
    with pytest.raises(RunError, match="1 scores for 3 texts"):
        ranked("", some, lambda prompt, candidates: [1.0])


def test_what_cannot_be_drawn_is_refused(reasoner: tuple[Decoder, Tokenizer]) -> None:
    with pytest.raises(UserError, match="Of 1 texts none can be chosen"):
        draw(*reasoner, PROMPT, 1)
    with pytest.raises(UserError, match="At temperature 0 all 4 texts are the same"):
        draw(*reasoner, PROMPT, 4, temperature=0.0)
    with pytest.raises(UserError, match="Beam search draws nothing"):
        draw(*reasoner, PROMPT, 4, num_beams=2)


# --- self-consistency ----------------------------------------------------------------------------


def test_the_majority_is_right_where_the_likeliest_text_is_wrong(
    reasoner: tuple[Decoder, Tokenizer],
) -> None:
    model, tokenizer = reasoner
    likeliest = best_of(
        model, tokenizer, PROMPT, 30, Likelihood(0.0), seed=5, temperature=1.0, max_new_tokens=12
    )
    assert number_in(likeliest.text) == "7"
    agreed = self_consistency(model, tokenizer, PROMPT, 30, number_in, seed=5, temperature=1.0)
    assert agreed.answer == "42" and 0.5 < agreed.share < 0.8
    assert list(agreed.votes)[:2] == ["42", "7"]
    assert sum(agreed.votes.values()) + agreed.without == 30
    assert number_in(agreed.candidates[0].text) == "42"
    assert agreed.candidates[0].score == agreed.share


def test_votes_are_counted() -> None:
    texts = ["x: 3", "none", "x: 4", "y 4", "3", "x: 5", ""]
    agreed = consensus([Candidate(text) for text in texts], number_in)
    # As many for 3 as for 4: the first drawn wins.
    assert agreed.votes == {"3": 2, "4": 2, "5": 1} and agreed.answer == "3"
    assert agreed.share == pytest.approx(2 / 7) and agreed.without == 2
    assert [one.text for one in agreed.candidates] == [
        "x: 3", "3", "x: 4", "y 4", "x: 5", "none", "",
    ]  # fmt: skip
    nothing = consensus([Candidate("a"), Candidate("b")], number_in)
    assert nothing.answer is None and nothing.share == 0 and nothing.candidates[0].text == "a"
    empty = consensus([Candidate("<>"), Candidate("x"), Candidate("<>")], found_by("<(.*)>"))
    assert empty.answer == "" and empty.candidates[-1].score == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 1,000.50", "1000.5"), ("１２．５個", "12.5"), ("0.1", "0.1"), ("−3", "-3"),
        ("7-3 = 4.0.", "4"), ("2e3", "2000"), ("1" * 60, "1" * 60), ("no", None), ("1e-3", "0.001"),
    ],
)  # fmt: skip
def test_numbers_are_written_plainly(text: str, number: str | None) -> None:
    assert number_in(text) == number


def test_answers_by_a_pattern() -> None:
    find = found_by(r"answer is (\w+)")
    assert find("The answer is A. No, the answer is B.") == "B" and find("C") is None
    with pytest.raises(UserError, match="no regular expression"):
        found_by("(")


# --- chats and reward models ---------------------------------------------------------------------


def test_answers_of_a_chat(reasoner: tuple[Decoder, Tokenizer]) -> None:
    chat = LocalChat(*reasoner)
    messages = [{"role": "user", "content": "6?"}]
    drawn = draw_replies(chat, messages, 3, seed=1, temperature=1.0, max_new_tokens=6)
    assert len(drawn) == 3 and all(one.logprob < 0 and one.tokens for one in drawn)
    assert ranked("6?", drawn, Likelihood())[0].score == max(
        one.logprob / one.tokens for one in drawn
    )


@pytest.fixture(scope="module", params=["reward", "labels"])
def judge(
    request: pytest.FixtureRequest, folder: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A model with a head on top; of its weights only one matters: that of the last token."""
    labels = {"reward": ["value"], "labels": ["bad", "good"]}[request.param]
    model, tokenizer = load(folder, head="classification", labels=labels)
    path: Path = tmp_path_factory.mktemp("judges") / request.param
    save_folder(model, tokenizer, path)
    return str(path)


@pytest.mark.parametrize("pair", [False, True])
def test_a_reward_model_reads_prompt_and_text(judge: str, pair: bool) -> None:
    several = judge.endswith("labels")
    reward = RewardModel.open(judge, device="cpu", label="good" if several else None, pair=pair)
    texts = [" so 42.", " oh 7.", " it is 42."]
    scores = reward(PROMPT, [Candidate(text) for text in texts])
    model, tokenizer = load(judge, device="cpu")
    for text, score in zip(texts, scores, strict=True):
        ids = tokenizer.encode(f"{PROMPT}\n{text}" if pair else f"{PROMPT}{text}")
        with torch.no_grad():
            found = model(torch.tensor([ids]))[0]
        expected = found.log_softmax(-1)[1] if several else found[0]
        assert score == pytest.approx(expected.item(), abs=1e-5)
    assert len(set(scores)) == 3


def test_what_is_no_reward_model_is_refused(judge: str, folder: str) -> None:
    with pytest.raises(UserError, match="no head that does"):
        RewardModel.open(folder, device="cpu")
    if judge.endswith("labels"):
        with pytest.raises(UserError, match="has the labels bad, good; say which"):
            RewardModel.open(judge, device="cpu")
        with pytest.raises(UserError, match=r"no label 'god'.*Did you mean 'good'"):
            RewardModel.open(judge, device="cpu", label="god")


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_the_best(
    folder: str, capsys: pytest.CaptureFixture[str], reasoner: tuple[Decoder, Tokenizer]
) -> None:
    command = ["generate", folder, PROMPT, "--best_of", "9", "--seed", "5", "--temperature", "1"]
    assert run(command) == 0
    plain = capsys.readouterr()
    best = best_of(*reasoner, PROMPT, 9, seed=5, temperature=1.0)
    assert plain.out == best.text + "\n" and "Best of 9 by likelihood" in plain.err
    assert run([*command, "--best_by", "votes"]) == 0
    voted = capsys.readouterr()
    assert voted.out.rstrip().endswith("42.") and "of 9 texts say 42." in voted.err
    assert run([*command, "--best_by", "votes", "--answer", "nothing", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] is None and found["votes"] == {} and len(found["candidates"]) == 9
    assert found["text"] == found["candidates"][0]["text"]
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == best.text and found["candidates"][0]["score"] == best.score


def test_the_command_draws_answers_and_asks_a_judge(
    folder: str, judge: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", folder, "6?", "--chat", "--system", "Be brief.", "--best_of", "3"]
    command += ["--max_new_tokens", "5", "--best_by", judge, "--json", "--seed", "1"]
    command += ["--good_label", "good"] if judge.endswith("labels") else []
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)
    scores = [one["score"] for one in found["candidates"]]
    assert scores == sorted(scores, reverse=True) and found["best_by"] == judge
    assert found["settings"]["temperature"] == 0.8  # so that there is something to choose from


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--best_of", "1"], "Of 1 texts none can be chosen"),
        (["--best_of", "4", "--temperature", "0"], "At temperature 0 all 4"),
        (["--best_of", "4", "--n", "2"], "--best_of prints one text and --n several"),
        (["--best_of", "4", "--num_beams", "2"], "Beam search draws nothing"),
        (["--best_by", "votes"], "--best_by decides between several texts; add --best_of"),
        (["--best_of", "4", "--answer", "x"], "--best_by votes"),
        (["--best_of", "4", "--good_label", "x"], "name it with --best_by MODEL"),
        (["--best_of", "4", "--best_by", "votes", "--answer", "("], "no regular expression"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: Sequence[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run(["generate", "no/such/model", "a", *flags])
