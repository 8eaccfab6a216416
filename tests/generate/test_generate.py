"""Text: streamed whole characters, stop strings never shown, results complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.generate import (
    complete,
    encode_prompt,
    generate,
    make_settings,
    stream,
)
from llm_from_scratch.generate.texts import StopBuffer
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer

Say = Callable[..., Decoder]
JAPANESE = "むかしむかし、王様がいました。🙂👩‍👩‍👧 漢字𠮟る。"


def test_pieces_joined_are_the_text(scripted: Say, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(JAPANESE)
    assert len(ids) > len(JAPANESE), "characters come in several tokens"
    model = scripted(JAPANESE, max_seq_len=200)
    pieces = list(generate(model, tokenizer, "Once", max_new_tokens=len(ids), temperature=0))
    assert "".join(pieces) == JAPANESE
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_ends_as_a_replacement(scripted: Say, tokenizer: Tokenizer) -> None:
    model = scripted(tokenizer.encode("𠮟")[:1], max_seq_len=200)
    (result,) = complete(model, tokenizer, ["Once"], max_new_tokens=1)
    assert result.text == "\ufffd"
    assert result.finish_reason == "length"


def test_end_of_text_stops_and_is_not_shown(scripted: Say, tokenizer: Tokenizer) -> None:
    model = scripted("The end.<|endoftext|>more")
    (result,) = complete(model, tokenizer, ["Once upon"], temperature=0)
    assert result.text == "The end."
    assert result.finish_reason == "stop"
    assert result.tokens == tokenizer.encode("The end.")
    assert result.prompt_tokens == len(tokenizer.encode("Once upon"))
    assert 0 < result.seconds_to_first_token <= result.seconds
    assert result.tokens_per_second == pytest.approx(len(result.tokens) / result.seconds)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["time"], "Once upon a "),
        (["me there"], "Once upon a ti"),
        (["there", "pon"], "Once u"),
        (["Once"], ""),
        (["nowhere"], "Once upon a time there was a king."),
        (["king.!"], "Once upon a time there was a king."),
        (["king."], "Once upon a time there was a "),
    ],
)
def test_stop_strings_across_tokens(
    scripted: Say, tokenizer: Tokenizer, stop: list[str], text: str
) -> None:
    model = scripted("Once upon a time there was a king.<|endoftext|>")
    pieces = list(stream(model, tokenizer, [[1]], make_settings(stop=stop, temperature=0)))
    result = pieces[-1].result
    assert result is not None
    assert result.text == "".join(piece.text for piece in pieces) == text
    found = any(one in "Once upon a time there was a king." for one in stop)
    assert result.finish_reason == ("stop_string" if found else "stop")


@given(text=st.text("abc", max_size=30), stop=st.lists(st.text("abc", min_size=1), max_size=3))
def test_nothing_of_a_stop_string_is_ever_shown(text: str, stop: list[str]) -> None:
    buffer = StopBuffer(stop)
    shown = ""
    found = [text.find(one) for one in stop if one in text]
    for character in text:
        shown += buffer.push(character)
        # Whatever follows, what is shown can never have been the beginning of a stop string.
        assert not any(one in shown for one in stop)
    if buffer.stopped:
        # The stop string that is complete first wins.
        assert any(text.startswith(shown + one) for one in stop)
        assert min(found) <= len(shown)
    else:
        assert not found
        assert shown + buffer.push("", last=True) == text


def test_a_batch_of_texts_equals_each_alone(
    make: Callable[..., Decoder], tokenizer: Tokenizer
) -> None:
    model = make(vocab_size=tokenizer.vocab_size)
    prompts = ["Once upon a time", "むかし", "T", "The king."]
    settings: dict[str, Any] = {"max_new_tokens": 14, "temperature": 1.0, "stop": ["e", "i"]}
    together = complete(model, tokenizer, prompts, seed=5, **settings)
    for row, prompt in enumerate(prompts):
        (alone,) = complete(model, tokenizer, [prompt], seed=5 + row, **settings)
        assert (alone.text, alone.tokens, alone.finish_reason) == (
            together[row].text,
            together[row].tokens,
            together[row].finish_reason,
        )


def test_the_same_seed_gives_the_same_text(
    make: Callable[..., Decoder], tokenizer: Tokenizer
) -> None:
    model = make(vocab_size=tokenizer.vocab_size)

    def text(seed: int) -> str:
        return "".join(generate(model, tokenizer, "Once", seed=seed, max_new_tokens=20))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_control_tokens_in_a_prompt_are_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_id
    assert end is not None
    assert end not in encode_prompt(tokenizer, "a<|endoftext|>b")
    assert encode_prompt(tokenizer, [end, 5]) == [end, 5]


def test_an_empty_prompt_starts_a_document(tokenizer: Tokenizer) -> None:
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_id]
    bare = train_tokenizer(["abc"], kind="char", special=(), unknown=False)
    with pytest.raises(UserError, match="prompt is empty"):
        encode_prompt(bare, "")


def test_bos_comes_first_where_the_tokenizer_asks_for_it(tokenizer: Tokenizer) -> None:
    spec, config = tokenizer.spec, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    bos = tokenizer.special_tokens["<|endoftext|>"]
    ids = tokenizer.encode("Once")
    for setting, first in ((True, [bos]), (False, [])):
        asked = Tokenizer.from_spec(spec, {**config, "add_bos_token": setting})
        assert encode_prompt(asked, "Once") == first + ids
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [bos], "tokens": ["<|endoftext|>"]}
        },
    }
    processed = Tokenizer.from_spec({**spec, "post_processor": template}, config)
    assert encode_prompt(processed, "Once") == [bos, *ids]


def test_a_character_model_can_be_continued(make: Callable[..., Decoder]) -> None:
    characters = train_tokenizer(["hello world"], kind="char", special=(), unknown=False)
    model = make(vocab_size=characters.vocab_size)
    (result,) = complete(model, characters, ["hell"], max_new_tokens=9, seed=0)
    assert len(result.text) == 9
    assert set(result.text) <= set("hello world")


def test_errors_come_before_the_first_piece(scripted: Say, tokenizer: Tokenizer) -> None:
    model = scripted("x")
    with pytest.raises(UserError, match=r"'temprature' .*Did you mean 'temperature'"):
        generate(model, tokenizer, "Once", temprature=1)
    with pytest.raises(UserError, match="top_p is 2"):
        generate(model, tokenizer, "Once", top_p=2)
    with pytest.raises(UserError, match="the model's context is 48 tokens"):
        generate(model, tokenizer, "Once upon a time " * 50)


def sentencepiece_like() -> Tokenizer:
    """A vocabulary that writes a space as a mark and drops the one before a text's first word."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False, unk_token="<unk>"))
    mark = {"replacement": "▁", "prepend_scheme": "first"}
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**mark)
    backend.decoder = tokenizers.decoders.Metaspace(**mark)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(
        ["Once upon a time there was a king. User: Assistant:"] * 9, trainer
    )
    return Tokenizer.from_spec(json.loads(backend.to_str()), {"eos_token": "</s>"})


def test_a_continuation_keeps_the_space_it_begins_with(scripted: Say) -> None:
    own = sentencepiece_like()
    whole, prompt = "Once upon a time", "Once upon"
    ids = own.encode(whole)
    before = own.encode(prompt)
    assert ids[: len(before)] == before
    model = scripted([*ids[len(before) :], own.eos_id])
    assert "".join(generate(model, own, prompt, temperature=0)) == " a time"
