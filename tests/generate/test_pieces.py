"""What a piece of text brings with it: the tokens it came from, and how likely they were."""

from __future__ import annotations

from typing import Any

import pytest

from llm_from_scratch.generate.generate import make_settings
from llm_from_scratch.generate.texts import Piece, TextEngine
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from tests.generate.conftest import TEXT, Scripted, make_model


def pieces_of(model: Decoder, tokenizer: Tokenizer, **settings: Any) -> list[Piece]:
    engine = TextEngine(model, tokenizer, cache_tokens=512)
    prompts = [tokenizer.encode("Once upon a"), tokenizer.encode("王")]
    return list(engine.stream(prompts, make_settings(**settings)))


@pytest.mark.parametrize(
    "settings",
    [
        {"logprobs": 2, "n": 2},
        {"logprobs": 0, "stop": ("a", "い", "e")},  # text is held back, and cut off
        {"prompt_logprobs": 1, "n": 2},
        {},
    ],
)
def test_all_pieces_together_are_the_result(settings: dict[str, Any], tokenizer: Tokenizer) -> None:
    """An untrained byte-level model writes many halves of characters, which are held back."""
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    pieces = pieces_of(model, tokenizer, max_new_tokens=40, temperature=1.2, seed=3, **settings)
    for row in (0, 1):
        for choice in range(settings.get("n", 1)):
            mine = [piece for piece in pieces if (piece.row, piece.choice) == (row, choice)]
            result = mine[-1].result
            assert result is not None and all(piece.result is None for piece in mine[:-1])
            assert "".join(piece.text for piece in mine) == result.text
            assert [token for piece in mine for token in piece.tokens] == result.tokens
            heard = [one for piece in mine for one in piece.logprobs]
            assert heard == (result.logprobs or [])
            assert mine[0].prompt_logprobs == result.prompt_logprobs
            assert all(piece.prompt_logprobs is None for piece in mine[1:])
            assert all(piece.text for piece in mine[:-1])
            if row == choice == 0:
                assert (result.prompt_logprobs is None) == ("prompt_logprobs" not in settings)


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
def test_a_prompt_may_end_inside_a_character(cut: int) -> None:
    """The first text is the character that the prompt began, and no U+FFFD."""
    bare = train_tokenizer(["ab"], vocab_size=257)
    ids = bare.encode("a🙂王")
    model = Scripted(make_model(vocab_size=bare.vocab_size).config, ids[cut:])
    engine = TextEngine(model, bare, cache_tokens=512)
    settings = make_settings(max_new_tokens=len(ids) - cut, temperature=0.0)
    text = "".join(piece.text for piece in engine.stream([ids[:cut]], settings))
    assert len(ids) == 8 and text == ("🙂王" if cut < 5 else "王")


def test_the_marks_of_tool_calls_are_shown() -> None:
    """Control tokens are no text, but without these nobody could tell a call from an answer."""
    special = ["<|endoftext|>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|im_end|>"]
    tokenizer = train_tokenizer([TEXT], vocab_size=320, special=special)
    tokenizer.chat_template = "<|im_end|>"
    text = 'I <tool_call>{"a": 1}</tool_call>[TOOL_CALLS]x<|im_end|>'
    config = make_model(vocab_size=tokenizer.vocab_size).config
    model = Scripted(config, tokenizer.encode(text, special=True))
    (result,) = (
        piece.result
        for piece in TextEngine(model, tokenizer, cache_tokens=512).stream(
            [tokenizer.encode("Once")], make_settings(max_new_tokens=40, temperature=0.0)
        )
        if piece.result is not None
    )
    assert result.text == 'I <tool_call>{"a": 1}</tool_call>[TOOL_CALLS]x'
    assert result.finish_reason == "stop"
