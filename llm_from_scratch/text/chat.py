"""Conversations as token ids, with a mask that says what the model is to learn.

Messages become one text through the model's chat template, and the text becomes ids. Two things
are easy to get wrong here:

*Control tokens in what people type.* A user who writes `<|im_end|>` must not end the turn. Before
rendering, every special token inside a message is replaced by a placeholder, so after rendering
only the template's own special tokens are control tokens; the others come back as ordinary text.

*Where the answer begins.* The ids are those of the whole text, as everybody else computes them,
and the mask is laid over them where the ids of the text before a boundary are exactly the first
ids of the whole. Where a token would straddle a boundary (an answer that begins with a line end,
after a header that ends with one), the text is encoded in pieces instead: that is what the model
sees when it is prompted, for there the header's ids are fixed before the answer begins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.text.chat_template import (
    CLOSE,
    OPEN,
    TEMPLATES,
    marks_generation,
    run_template,
)
from llm_from_scratch.text.pretokenize import special_splitter
from llm_from_scratch.text.stream import StreamDecoder
from llm_from_scratch.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
HOLDER, HOLDER_END = "\ue0f2", "\ue0f3"  # around the number of a protected piece of text
PRIVATE = (OPEN, CLOSE, HOLDER, HOLDER_END)
_HOLDER = re.compile(f"{HOLDER}([0-9]+){HOLDER_END}")


class ChatTokens(NamedTuple):
    """A conversation: `ids`, and `mask` with 1 for every token on which a loss is taken.

    The mask covers what the assistant writes: its content and the token that ends its turn, but
    not the header that the template writes for it. `mask[i]` speaks of `ids[i]` as a *target*.
    """

    ids: list[int]
    mask: list[int]


# ------------------------------------------------------------------------- messages


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as plain dicts with text contents; a `UserError` names the one that is wrong."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError('A conversation is a list of messages {"role": ..., "content": ...}.')
    if not messages:
        raise UserError("The conversation has no messages; give at least one.")
    return [_check_message(message, number) for number, message in enumerate(messages, 1)]


def _check_message(message: Message, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(
            f'Message {number} is no mapping with "role" and "content", but {message!r:.60}.'
        )
    role = message.get("role")
    if role not in ROLES:
        close = OTHER_NAMES.get(str(role).lower())
        hint = f" Did you mean '{close}'?" if close else nearest(str(role), ROLES)
        said = "no role" if role is None else f"the role {role!r}"
        raise UserError(f"Message {number} has {said}; known are {', '.join(ROLES)}.{hint}")
    content = message.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, number)
    if content is None and not message.get("tool_calls"):
        raise UserError(f"Message {number} ({role}) has no content; give it a text, if only ''.")
    if content is not None and not isinstance(content, str):
        raise UserError(f"Message {number} ({role}) has content that is no text: {content!r:.60}.")
    plain = {str(key): _plain(value, number) for key, value in message.items()}
    return {**plain, "role": role, "content": content}


def _joined_parts(parts: list[Any], number: int) -> str:
    """OpenAI's content in parts; only those of type "text" can be read here."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise UserError(
                f"Message {number} has a part that is no text; only text parts can be read."
            )
        texts.append(part["text"])
    return "".join(texts)


def _plain(value: Any, number: int) -> Any:
    """A copy made of JSON's types: a template must not get hold of objects with methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, number) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, number) for item in value]
    raise UserError(f"Message {number} holds a {type(value).__name__}; only JSON values can be.")


class Protector:
    """Takes special tokens out of messages, and puts them back as text."""

    def __init__(self, special: Sequence[str]) -> None:
        self._split = special_splitter([*special, *PRIVATE])
        self.texts: list[str] = []

    def protect(self, value: Any) -> Any:
        """`value` with every special token in its texts replaced by a numbered placeholder."""
        if isinstance(value, str):
            parts = self._split(value)
            for i in range(1, len(parts), 2):
                self.texts.append(parts[i])
                parts[i] = f"{HOLDER}{len(self.texts) - 1}{HOLDER_END}"
            return "".join(parts)
        if isinstance(value, dict):
            return {key: self.protect(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.protect(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        return _HOLDER.sub(lambda match: self.texts[int(match[1])], text)


# ------------------------------------------------------------------------- rendering


class _Renderer:
    """One conversation with its template: renders it and prefixes of it."""

    def __init__(
        self,
        messages: Sequence[Message],
        template: str,
        special: Sequence[str],
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        self.template = template
        self.protector = Protector(special)
        self.variables = dict(variables)
        self.messages = self.protector.protect(check_messages(messages))
        self.tools = None if tools is None else self.protector.protect(_plain(list(tools), 0))

    def render(self, count: int | None = None, *, add_generation_prompt: bool = False) -> str:
        """The first `count` messages, with placeholders and the marks of generation blocks."""
        messages = self.messages[:count]
        try:
            return self._run(messages, add_generation_prompt)
        except TemplateError as error:
            number = self._first_refused()
            role = self.messages[number - 1]["role"]
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"Message {number} ({role}) does not fit the model's chat template: {reason}."
            ) from error

    def first_header(self) -> str:
        """What stands before the content of the first message.

        Templates cannot render a prompt without messages, so a mark in the place of the content
        shows where it goes.
        """
        return self._run([{**self.messages[0], "content": OPEN}], False).partition(OPEN)[0]

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return run_template(
            self.template,
            {
                **self.variables,
                "messages": messages,
                "tools": self.tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            },
        )

    def _first_refused(self) -> int:
        for count in range(1, len(self.messages)):
            try:
                self._run(self.messages[:count], False)
            except TemplateError:
                return count
        return len(self.messages)


def render(
    messages: Sequence[Message],
    template: str,
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos: str | None = None,
    eos: str | None = None,
    **variables: Any,
) -> str:
    """The conversation as the text that the template makes of it.

    `template` is Jinja or the name of one of `TEMPLATES`. This is for reading: text alone does not
    say which `<|im_end|>` is a control token; `encode_chat` keeps them apart.
    """
    named = {"bos_token": bos, "eos_token": eos}
    variables |= {name: token for name, token in named.items() if token is not None}
    renderer = _Renderer(messages, TEMPLATES.get(template, template), (), variables, tools)
    text = renderer.render(add_generation_prompt=add_generation_prompt)
    return renderer.protector.restore(_without_marks(text))


def _without_marks(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


def template_of(tokenizer: Tokenizer, template: str | None = None) -> str:
    """The template to use: the one given (a name or Jinja), the tokenizer's, or "plain"."""
    chosen = template or tokenizer.chat_template or "plain"
    return TEMPLATES.get(chosen, chosen)


def stop_strings(tokenizer: Tokenizer, template: str | None = None) -> tuple[str, ...]:
    """Where an answer ends besides the stop ids: the plain template has no end-of-turn token."""
    return ("\nUser:",) if template_of(tokenizer, template) == TEMPLATES["plain"] else ()


def _renderer(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
) -> _Renderer:
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    variables = {name: tokenizer.config[name] for name in names if tokenizer.config.get(name)}
    special = list(tokenizer.special_tokens)
    return _Renderer(messages, template_of(tokenizer, template), special, variables, tools)


# ------------------------------------------------------------------------- encoding


@lru_cache(maxsize=8)
def _control_splitter(special: tuple[str, ...]) -> Any:
    return special_splitter(special)


def _encode(tokenizer: Tokenizer, text: str, protector: Protector) -> list[int]:
    """The ids of rendered text: its special tokens are control tokens, placeholders are text."""
    if HOLDER not in text:
        return tokenizer.encode(text, special=True)
    ids: list[int] = []
    for i, part in enumerate(_control_splitter(tuple(tokenizer.special_tokens))(text)):
        if i % 2:
            ids.append(tokenizer.special_tokens[part])
        elif part:
            ids += tokenizer.encode(protector.restore(part))
    return ids


def encode_chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """The ids after which the model writes the assistant's next message."""
    renderer = _renderer(tokenizer, messages, template, tools)
    text = _without_marks(renderer.render(add_generation_prompt=True))
    return _encode(tokenizer, text, renderer.protector)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> ChatTokens:
    """The ids of a whole conversation and the mask of what the assistant wrote.

    Raises `UserError` for messages that the template refuses, and for a template that rewrites
    earlier turns and does not say with {% generation %} what the assistant writes.
    """
    renderer = _renderer(tokenizer, messages, template, tools)
    text, spans = _trained_spans(renderer, list(tokenizer.special_tokens))
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    ids = _encode(tokenizer, text, renderer.protector)
    places = [0]
    for edge in edges[1:-1]:
        before = _encode(tokenizer, text[:edge], renderer.protector)
        if ids[: len(before)] != before:
            return _encode_pieces(tokenizer, text, edges, renderer.protector)
        places.append(len(before))
    places.append(len(ids))
    mask: list[int] = []
    for i in range(len(edges) - 1):
        mask += [i % 2] * (places[i + 1] - places[i])
    return ChatTokens(ids, mask)


def _encode_pieces(
    tokenizer: Tokenizer, text: str, edges: list[int], protector: Protector
) -> ChatTokens:
    ids: list[int] = []
    mask: list[int] = []
    for i in range(len(edges) - 1):
        piece = _encode(tokenizer, text[edges[i] : edges[i + 1]], protector)
        ids += piece
        mask += [i % 2] * len(piece)
    return ChatTokens(ids, mask)


def _trained_spans(
    renderer: _Renderer, special: Sequence[str]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text (with placeholders) and where in it the assistant's turns are."""
    marked = renderer.render()
    if marks_generation(renderer.template):
        return _marked_spans(marked)
    spans = []
    for index, message in enumerate(renderer.messages):
        if message["role"] != "assistant":
            continue
        if index:
            before = renderer.render(index, add_generation_prompt=True)
        else:
            before = renderer.first_header()
        through = renderer.render(index + 1)
        if not (marked.startswith(through) and through.startswith(before)):
            raise UserError(
                f"The chat template rewrites the conversation around message {index + 1} "
                "(assistant), so it cannot be seen which tokens the model has to learn; use a "
                "template with {% generation %} blocks, or conversations with one answer."
            )
        spans.append((len(before), _end_of_turn(through, len(before), special)))
    return marked, spans


def _marked_spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    spans, text, inside = [], "", False
    for part in re.split(f"([{OPEN}{CLOSE}])", marked):
        if part in (OPEN, CLOSE):
            if inside == (part == OPEN):
                raise UserError("The chat template nests {% generation %} blocks; it may not.")
            inside = part == OPEN
        else:
            if inside and part:
                spans.append((len(text), len(text) + len(part)))
            text += part
    return text, spans


def _end_of_turn(text: str, start: int, special: Sequence[str]) -> int:
    """Behind the turn's last control token, if only white space follows it, else the text's end.

    The line end that ChatML writes after `<|im_end|>` is not the model's: it has stopped by then.
    """
    parts = _control_splitter(tuple(special))(text[start:])
    if len(parts) > 1 and not parts[-1].strip():
        return len(text) - len(parts[-1])
    return len(text)


# ------------------------------------------------------------------------- looking at it


def mask_pieces(tokenizer: Tokenizer, tokens: ChatTokens) -> list[dict[str, Any]]:
    """One entry per token, for JSON: its id, its printable text and whether it is learned."""
    return [
        {"id": i, "text": tokenizer.token_text(i), "loss": bool(on)}
        for i, on in zip(tokens.ids, tokens.mask, strict=True)
    ]


def show_mask(tokenizer: Tokenizer, tokens: ChatTokens, *, color: bool = True) -> str:
    """The conversation to print: what is learned in green, the rest dim.

    Without `color` the learned parts stand between `[[` and `]]`.
    """
    runs: list[tuple[int, list[int]]] = []
    for token, on in zip(tokens.ids, tokens.mask, strict=True):
        if not runs or runs[-1][0] != on:
            runs.append((on, []))
        runs[-1][1].append(token)
    styles = {1: ("\x1b[1;32m", "\x1b[0m"), 0: ("\x1b[2m", "\x1b[0m")}
    if not color:
        styles = {1: ("[[", "]]"), 0: ("", "")}
    decoder = StreamDecoder(tokenizer)
    shown = ""
    for i, (on, ids) in enumerate(runs):
        text = "".join(decoder.push(token) for token in ids)
        if i == len(runs) - 1:
            text += decoder.flush()
        # Control characters in a message must not paint the terminal themselves.
        text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
        shown += styles[on][0] + text + styles[on][1]
    return shown
