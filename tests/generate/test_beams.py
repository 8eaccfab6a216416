"""Beam search: what the reference library finds, with its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llm_from_scratch.generate.constraint import make_constraint
from llm_from_scratch.generate.engine import Engine
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.generate.requests import Request
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.folder import load_folder, save_folder
from tests.generate.conftest import make_model
from tests.generate.engines import answers, engine_for, finish
from tests.model.references import make_reference
from tests.model.references_seq2seq import make_seq2seq

PROMPTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [11, 12, 13, 14]]
END = 6
# Written as the settings of the two libraries.
WAYS: list[dict[str, Any]] = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 2.5},
    {"length_penalty": -1.0},
    {"repetition_penalty": 1.3, "length_penalty": 0.7},
    {"no_repeat_ngram": 2},
]


def beams(width: int, n: int, **way: Any) -> SamplingSettings:
    return SamplingSettings(max_new_tokens=14, temperature=0.0, num_beams=width, n=n, **way)


def theirs_say(
    theirs: Any, prompt: list[int], settings: SamplingSettings, way: dict[str, Any], ends: list[int]
) -> list[list[int]]:
    way = {("no_repeat_ngram_size" if k == "no_repeat_ngram" else k): v for k, v in way.items()}
    with torch.inference_mode():
        found = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=settings.max_new_tokens, early_stopping=False,
            num_beams=settings.num_beams, num_return_sequences=settings.n, pad_token_id=0,
            eos_token_id=ends, **way,
        )  # fmt: skip
    given = 1 if theirs.config.is_encoder_decoder else len(prompt)
    texts = []
    for row in found[:, given:].tolist():
        stops = [i for i, token in enumerate(row) if token in ends]
        texts.append(row[: stops[0] + 1] if stops else row)
    return texts


def check(ours: Any, theirs: Any, ends: list[int]) -> None:
    lengths = set()
    for way in WAYS:
        for width, n in ((2, 1), (4, 3)):
            settings = beams(width, n, **way)
            for prompt in PROMPTS:
                wanted = theirs_say(theirs, prompt, settings, way, ends)
                found = answers(ours, Request(prompt, settings, frozenset(ends)))
                assert [found[choice][0] for choice in range(n)] == wanted, (way, width, prompt)
                lengths |= {len(text) for text in wanted}
    assert len(lengths) > 3  # some ended early


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_decoders_find_what_transformers_finds(family: str, tmp_path: Path) -> None:
    make_reference(family).save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    assert isinstance(ours, Decoder)
    free = [answers(ours, Request(prompt, beams(4, 1)))[0][0] for prompt in PROMPTS]
    ends = [text[3 + place] for place, text in enumerate(free)]
    check(ours, AutoModelForCausalLM.from_pretrained(tmp_path), sorted(set(ends)))


@pytest.mark.parametrize("family", ["t5", "marian", "bart"])
def test_encoder_decoders_find_what_transformers_finds(family: str, tmp_path: Path) -> None:
    make_seq2seq(family).save_pretrained(tmp_path / "theirs")
    ours, _ = load_folder(tmp_path / "theirs")
    assert isinstance(ours, EncoderDecoder)
    save_folder(ours, None, tmp_path / "ours")  # with what generation_config.json says
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    own = [] if ours.config.end_id is None else [ours.config.end_id]
    check(ours, theirs, [*own, 17, 30, 44, 51])


def test_the_texts_and_their_logprobs() -> None:
    """Their sum, divided by the length, is what they are sorted by."""
    model = make_model()
    request = Request([5, 9, 2], beams(4, 4, logprobs=2, prompt_logprobs=0), frozenset({END}))
    engine = Engine(model, cache_tokens=400)
    engine.submit(request)
    values = []
    for (_, choice), new in sorted(finish(engine).items()):
        text = [5, 9, 2, *(one.token for one in new)]
        with torch.inference_mode():
            logprobs = model(torch.tensor([text]))[0].log_softmax(-1)
        for place, one in enumerate(new):
            assert one.logprobs is not None and len(one.logprobs.top) == 2
            wanted = logprobs[place + 2, one.token].item()
            assert one.logprobs.logprob == pytest.approx(wanted, abs=1e-4)
        heard = new[0].prompt_logprobs
        if choice == 0:
            assert heard is not None and [one.token for one in heard] == [9, 2]
            assert heard[1].logprob == pytest.approx(logprobs[1, 2].item(), abs=1e-4)
        assert all(one.prompt_logprobs is None for one in new[choice == 0 :])
        values.append(sum(one.logprobs.logprob for one in new if one.logprobs) / len(new))
    assert values == sorted(values, reverse=True)


def test_prompt_logprobs_of_a_prompt_in_pieces() -> None:
    """The search begins when all of the prompt was read."""
    model = make_model(max_seq_len=200)
    prompt = [(7 * i) % 80 for i in range(150)]
    plain = answers(model, Request(prompt, beams(3, 3)))
    engine = Engine(model, cache_tokens=600)
    engine.submit(Request(prompt, beams(3, 3, prompt_logprobs=0)))
    texts = finish(engine)
    for choice in range(3):
        assert [one.token for one in texts[0, choice]] == plain[choice][0]
    heard = texts[0, 0][0].prompt_logprobs
    assert heard is not None and [one.token for one in heard] == prompt[1:]


def test_many_searches_side_by_side() -> None:
    model = make_model()
    settings = beams(3, 2)
    engine = engine_for(model, PROMPTS, settings, [END])
    texts = finish(engine)
    for number, prompt in enumerate(PROMPTS):
        for choice, (tokens, reason) in answers(
            model, Request(prompt, settings, frozenset({END}))
        ).items():
            found = texts[number, choice]
            assert ([one.token for one in found], found[-1].finish_reason) == (tokens, reason)


def test_a_search_of_a_given_form(tokenizer: Tokenizer) -> None:
    """The likeliest of a few texts, by their own log-probabilities; never more than there are."""
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=120)
    texts = ["a king", "the end", "once"]
    settings = beams(4, 4, choice=texts, length_penalty=0.0)
    end = tokenizer.eos_id
    assert end is not None
    prompt = tokenizer.encode("Once upon")
    form = make_constraint(settings, tokenizer, stop_ids=[end])
    engine = Engine(model, cache_tokens=400)
    engine.submit(Request(prompt, settings, frozenset({end}), form))
    found = {
        choice: tokenizer.decode([one.token for one in new if one.token != end])
        for (_, choice), new in finish(engine).items()
    }
    assert set(found.values()) <= set(texts) and found
    results = complete(
        model, tokenizer, ["Once upon"], max_new_tokens=14, temperature=0.0, num_beams=4, n=4,
        choice=texts, length_penalty=0.0,
    )  # fmt: skip
    assert {result.text for result in results} == set(found.values())
    assert {result.finish_reason for result in results} == {"stop"}


def test_a_search_for_json(tokenizer: Tokenizer) -> None:
    import json

    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=120)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    results = complete(
        model, tokenizer, ["Once upon"], max_new_tokens=40, temperature=0.0, num_beams=3, n=2,
        json_schema=schema,
    )  # fmt: skip
    assert {json.loads(result.text)["a"] for result in results} <= {True, False}
    assert len(results) == 2
