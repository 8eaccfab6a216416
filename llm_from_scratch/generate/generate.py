"""Text in, text out: what `scratchlm generate`, `llm.generate` and the training samples call.

`stream` is the one path: it puts the prompts into an engine (`texts.py`, `engine.py`) of just the
size that they need.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.engine import room_for
from llm_from_scratch.generate.requests import Writer
from llm_from_scratch.generate.settings import SamplingSettings, make_settings
from llm_from_scratch.generate.texts import Piece, Result, TextEngine
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.text.inputs import put_around
from llm_from_scratch.text.tokenizer import Tokenizer

__all__ = [
    "Piece",
    "Result",
    "SamplingSettings",
    "complete",
    "encode_for",
    "encode_prompt",
    "encode_source",
    "generate",
    "make_settings",
    "stream",
]


def wants_bos(tokenizer: Tokenizer) -> bool:
    """Whether texts of this tokenizer begin with its bos token (as its model was trained)."""
    return put_around(tokenizer)[0]


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The ids to start from. Text is a user's text: control tokens in it stay ordinary text.

    The bos token is put in front where the tokenizer asks for it. An empty prompt is the beginning
    of a document: bos, or the eos token that ended the document before.
    """
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    ids = tokenizer.encode(prompt)
    if wants_bos(tokenizer) and tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *ids]
    if ids:
        return ids
    for start in (tokenizer.bos_id, tokenizer.eos_id):
        if start is not None:
            return [start]
    raise UserError(
        "The prompt is empty and this tokenizer has no token that begins a text; give at least "
        "one character."
    )


def encode_source(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The ids that an encoder reads: a text with the special tokens that belong around it."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    return tokenizer.encode_inputs([prompt]).ids[0]


def encode_for(model: Writer, tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The ids of a prompt: the beginning for a decoder, the source for an encoder-decoder."""
    encode = encode_source if isinstance(model, EncoderDecoder) else encode_prompt
    return encode(tokenizer, prompt)


def stream(
    model: Writer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    **options: Any,
) -> Generator[Piece, None, None]:
    """Continue prompts (token ids) together and yield text as soon as it is certain.

    An encoder-decoder takes them as sources and writes their targets. Prompts are checked before
    the first piece is asked for. The generator may be closed early. `options` are those of
    `Engine`, such as `proposer` and `cache_dtype`.
    """
    if not prompts:
        raise UserError("There is no prompt to continue; give at least one.")
    options = {"cache_tokens": room_for(model, prompts, settings), **options}
    return TextEngine(model, tokenizer, **options).stream(prompts, settings)


def complete(
    model: Writer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Result]:
    """Continue several prompts (texts or token ids) together; results in their order.

    An encoder-decoder reads each prompt as a source and writes its target. Takes the fields of
    `SamplingSettings`; with `n` above 1 each prompt has that many results, one after another. Text
    number i (from 0) is seeded with `seed` + i. `options` as in `stream`.
    """
    ids = [encode_for(model, tokenizer, prompt) for prompt in prompts]
    done: dict[tuple[int, int], Result] = {}
    for piece in stream(model, tokenizer, ids, make_settings(**settings), **(options or {})):
        if piece.result is not None:
            done[piece.row, piece.choice] = piece.result
    return [done[place] for place in sorted(done)]


def generate(
    model: Writer, tokenizer: Tokenizer, prompt: str | Sequence[int], **settings: Any
) -> Iterator[str]:
    """The continuation of a prompt, piece by piece, without the prompt itself.

    An encoder-decoder reads the prompt as a source and writes its target.

    >>> for piece in generate(model, tokenizer, "Once upon a time", temperature=0.8, seed=1):
    ...     print(piece, end="")

    Takes the fields of `SamplingSettings`; wrong ones raise `UserError` here, not at the first
    piece.
    """
    ids = encode_for(model, tokenizer, prompt)
    pieces = stream(model, tokenizer, [ids], make_settings(**settings))
    return (piece.text for piece in pieces if piece.text)
