"""What an engine is asked for, and how far it has come: requests, sequences, new tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.generate.pages import ROOT
from llm_from_scratch.generate.sampling import Chooser, SamplingSettings, TokenLogprobs
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder

if TYPE_CHECKING:
    from llm_from_scratch.generate.constraint import Constraint

Writer = Decoder | EncoderDecoder
BASE = ""  # the adapter of a request that wants the model without one


@dataclass(frozen=True)
class NewToken:
    """One token of one text; `finish_reason` is None until the text's last one.

    "stop": the token is an end token, or nothing may follow it. "length": `max_new_tokens` or the
    context is used up; some encoder-decoders are then made to end, so that this token too may be an
    end token. `choice` counts the texts of a request. `prompt_logprobs` comes with the first token
    of a request's first text, where it was asked for: one entry for each token of the prompt but
    the first.
    """

    request: int
    choice: int
    token: int
    finish_reason: str | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Request:
    """A prompt to continue (of an encoder-decoder: a source to make a text of), and how.

    `end_ids` are the tokens at which a text ends; `constraint` says what may be written at all.
    `adapter` is the name of the adapter to write with, `BASE` the model without any, and None
    whatever acts in the model when the request is submitted.
    """

    prompt: Many[int]
    settings: SamplingSettings
    end_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    adapter: str | None = None


@dataclass(eq=False)
class Sequence:
    """One text on its way.

    Attributes:
        tokens: what stands there: the prompt (or the start token) and what was written.
        given: how many of these were given.
        end: at how many tokens the text is full.
        table, cached: its pages, and how many of its tokens they hold.
        serial, known: the serial number of its first full pages, and how many these are.
        guess: tokens that a draft expects next; checked all at once with the model itself.
        source: of an encoder-decoder, each layer's keys and values of the source.
    """

    number: int
    choice: int
    request: Request
    tokens: list[int]
    end: int
    chooser: Chooser
    given: int = 0
    table: list[int] = field(default_factory=list)
    cached: int = 0
    serial: int = ROOT
    known: int = 0
    guess: list[int] = field(default_factory=list)
    guess_odds: Tensor | None = None
    source: list[tuple[Tensor, Tensor]] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None

    def __post_init__(self) -> None:
        self.given = self.given or len(self.tokens)
        if self.request.settings.prompt_logprobs is not None and self.choice == 0:
            self.prompt_logprobs = []

    @property
    def pending(self) -> int:
        """How many of its tokens the model has not read yet."""
        return len(self.tokens) - self.cached

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.prompt_logprobs is not None and len(self.tokens) == self.given


@dataclass(frozen=True)
class Feed:
    """Tokens that a sequence gives to the model in one pass; logits of the last `want` come back.

    `tokens` are those behind the sequence's `cached` ones, or a first part of them.
    """

    sequence: Sequence
    tokens: list[int]
    want: int


def as_writer(model: nn.Module) -> Writer:
    """The model, if it is one that writes text; a `UserError` if not."""
    if not isinstance(model, Decoder | EncoderDecoder):
        raise UserError(
            "This model reads text and writes none (it is an encoder, or has a head that labels): "
            "give a decoder or an encoder-decoder. "
            "For embeddings: llm.load(MODEL, head='embedding')."
        )
    return model


def writing_stack(model: Writer) -> Decoder:
    """The decoder: the model itself, or that of an encoder-decoder."""
    stack = model.decoder if isinstance(model, EncoderDecoder) else model
    assert isinstance(stack, Decoder)
    return stack


def check_prompt(model: Writer, prompt: Many[int]) -> None:
    """Refuse a prompt that the model cannot read, in a sentence."""
    reader = model.encoder if isinstance(model, EncoderDecoder) else model
    context, vocab = reader.config.max_seq_len, reader.config.vocab_size
    if not prompt:
        raise UserError("The prompt has no tokens; give at least one to start from.")
    if len(prompt) > context:
        raise UserError(
            f"The prompt has {len(prompt)} tokens, but the model's context is {context} "
            "tokens. Give a shorter prompt."
        )
    if max(prompt) >= vocab or min(prompt) < 0:
        raise UserError(
            f"The prompt has the token id {max(prompt)}, but the model's vocabulary ends at "
            f"{vocab - 1}. Use the tokenizer that belongs to this model."
        )


def check_numbers(logits: Tensor, whose: str = "model") -> None:
    """Raise a `RunError` where a model's logits are no numbers."""
    if logits.numel() and math.isnan(logits.amax().item()):  # NaN is larger than anything
        raise RunError(
            f"The {whose}'s output is not a number (NaN): its weights are broken or overflow in "
            "this precision. Try --dtype fp32."
        )


def obey(pair: EncoderDecoderConfig, sequence: Sequence, logits_v: Tensor) -> Tensor:
    """The logits without what an encoder-decoder never writes: padding, another beginning than
    the one that is set, or more than there is room."""
    logits_v = logits_v.clone()
    length = len(sequence.tokens)
    if not pair.writes_start:
        logits_v[pair.start_id] = -math.inf
    only = pair.first_id if length == 1 else None
    if pair.end_id is not None and length + 1 >= sequence.end:
        only = pair.end_id
    if only is not None:
        logits_v = torch.full_like(logits_v, -math.inf)
        logits_v[only] = 0.0
    return logits_v
