"""Log-probabilities are those of the reference library's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.engine import Engine
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.generate.requests import Request
from llm_from_scratch.generate.sampling import SamplingSettings, TokenLogprobs
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.folder import load_folder
from tests.generate.conftest import make_model
from tests.generate.engines import finish
from tests.model.references import make_reference
from tests.model.references_seq2seq import make_seq2seq

# Nothing of this changes what the model thought.
CHANGES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.5, "logit_bias": {3: 5.0}},
]


def assert_are(found: list[TokenLogprobs], logits_tv: torch.Tensor, tokens: list[int]) -> None:
    """`logits_tv` are those that the tokens were chosen from."""
    logprobs = logits_tv.log_softmax(-1)
    assert [one.token for one in found] == tokens
    for place, one in enumerate(found):
        assert one.logprob == pytest.approx(logprobs[place, one.token].item(), abs=1e-4)
        best = logprobs[place].topk(len(one.top))
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [token for token, _ in one.top] == best.indices.tolist()


@pytest.mark.parametrize("way", CHANGES, ids=["greedy", "drawn"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_of_a_decoder(family: str, way: dict[str, Any], tmp_path: Path) -> None:
    """Also while the prompt is read in pieces, and again by texts that were sent back."""
    make_reference(family).save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(ours, Decoder)
    settings = SamplingSettings(max_new_tokens=9, seed=1, logprobs=3, prompt_logprobs=2, **way)
    engine = Engine(ours, cache_tokens=64, chunk=9)
    prompts = [[(7 * i + n) % 60 for i in range(n)] for n in (30, 1, 17, 28)]
    for prompt in prompts:
        engine.submit(Request(prompt, settings))
    texts = finish(engine)
    for number, prompt in enumerate(prompts):
        new = texts[number, 0]
        text = [*prompt, *(one.token for one in new)]
        with torch.inference_mode():
            logits = theirs(torch.tensor([text])).logits[0]
        heard = new[0].prompt_logprobs
        assert heard is not None and all(one.prompt_logprobs is None for one in new[1:])
        assert_are(heard, logits[: len(prompt) - 1], prompt[1:])
        said = [one.logprobs for one in new if one.logprobs is not None]
        assert_are(said, logits[len(prompt) - 1 : -1], text[len(prompt) :])


@pytest.mark.parametrize("family", ["t5", "marian", "bart"])
def test_of_an_encoder_decoder(family: str, tmp_path: Path) -> None:
    """What it is made to write is no more likely for that."""
    make_seq2seq(family).save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(ours, EncoderDecoder)
    engine = Engine(ours, cache_tokens=64)
    source = [5, 9, 2, 11]
    engine.submit(Request(source, SamplingSettings(max_new_tokens=9, seed=1, logprobs=3)))
    (new,) = finish(engine).values()
    target = [ours.config.start_id, *(one.token for one in new)]
    with torch.inference_mode():
        logits = theirs(
            torch.tensor([source]), decoder_input_ids=torch.tensor([target[:-1]])
        ).logits[0]
    assert_are([one.logprobs for one in new if one.logprobs], logits, target[1:])
    with pytest.raises(UserError, match="prompt_logprobs was asked of an encoder-decoder"):
        engine.submit(Request(source, SamplingSettings(prompt_logprobs=0)))


def test_of_a_prompt_that_is_read_twice() -> None:
    """Its text was sent back in the middle of it."""
    model = make_model(max_seq_len=96)
    engine = Engine(model, cache_tokens=7 * 16, chunk=1)
    for token in (1, 2):
        engine.submit(Request([token], SamplingSettings(max_new_tokens=40, temperature=0.0)))
    prompt = [(7 * i) % 60 for i in range(40)]
    engine.submit(Request(prompt, SamplingSettings(max_new_tokens=1, prompt_logprobs=0)))
    engine.step()
    (text,) = (one for one in engine.running if one.number == 2)
    while text in engine.running:
        engine.step()
    assert text in engine.waiting and text.prompt_logprobs
    (new,) = finish(engine)[2, 0]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]))[0, :-1]
    assert new.prompt_logprobs is not None
    assert_are(new.prompt_logprobs, logits, prompt[1:])


def test_of_texts(tokenizer: Tokenizer) -> None:
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=96)
    (plain,) = complete(model, tokenizer, ["Once upon"], max_new_tokens=5, temperature=0)
    assert plain.logprobs is None and plain.prompt_logprobs is None
    (result,) = complete(
        model, tokenizer, ["Once upon"], max_new_tokens=5, temperature=0, logprobs=1,
        prompt_logprobs=0,
    )  # fmt: skip
    assert result.logprobs is not None and result.prompt_logprobs is not None
    assert [one.token for one in result.logprobs] == result.tokens
    assert [one.token for one in result.prompt_logprobs] == tokenizer.encode("Once upon")[1:]
