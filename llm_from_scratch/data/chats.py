"""Conversations to learn from, in the shapes in which people keep them.

Whatever a row looks like, it becomes {"messages": [{"role", "content"}, ...]}, and "tools" where it
has some:

    messages                            OpenAI's; what `scratchlm chat` and the page export
    conversations: from, value          ShareGPT
    instruction, input, output          Alpaca
    prompt, response (or completion)    texts, or messages; a prompt in Alpaca's frame is unwrapped
    question, answer
    utterances: interlocutor_id, text   two people talking (the second one's turns are learnt)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.records import BadRow
from llm_from_scratch.text.chat import OTHER_NAMES, check_messages
from llm_from_scratch.text.tokenizer import without_surrogates

Messages = list[dict[str, Any]]

SHAPES = (
    "messages; conversations (ShareGPT); instruction, input and output (Alpaca); prompt and "
    "response; or question and answer"
)
# The frame that Stanford Alpaca puts around a request, as texts of data sets have it.
FRAME = re.compile(
    r"\ABelow is an instruction that describes a task.*?\n+### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n+### Input:\n(?P<input>.*?))?\n+### Response:\s*\Z",
    re.S,
)


def conversation_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The row as {"messages": ...}, ending with an answer; `BadRow` for one that is no chat.

    What follows the last answer is left out: there is nothing to learn from it.
    """
    values = _whole_characters(values)
    messages = _messages(values)
    try:
        messages = check_messages(messages)
    except UserError as error:
        raise BadRow(f"is no conversation: {error}") from error
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRow("has no message of the assistant, so nothing to learn; leave it out.")
    messages = messages[: answers[-1] + 1]
    for number, message in enumerate(messages, start=1):
        empty = not (message["content"] or "").strip()
        if message["role"] == "assistant" and empty and not message.get("tool_calls"):
            raise BadRow(
                f"has an empty answer (message {number}); fill it in or leave the row out."
            )
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise BadRow("has an answer, but nothing that is answered; give the question as well.")
    found: dict[str, Any] = {"messages": messages}
    if isinstance(values.get("tools"), list) and values["tools"]:
        found["tools"] = values["tools"]
    return found


def _whole_characters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The row without halves of characters, which JSON can spell and no tokenizer takes."""
    try:
        found: dict[str, Any] = json.loads(
            without_surrogates(json.dumps(values, ensure_ascii=False, default=str))
        )
    except (ValueError, RecursionError) as error:
        raise BadRow(f"cannot be read ({error}); leave it out.") from error
    return found


def _messages(values: Mapping[str, Any]) -> Any:
    if "messages" in values:
        return _listed(values["messages"], "messages")
    if "conversations" in values or "conversation" in values:
        name = "conversations" if "conversations" in values else "conversation"
        return _system(values) + _sharegpt(_listed(values[name], name), name)
    if "utterances" in values:
        return _dialogue(_listed(values["utterances"], "utterances"))
    if "instruction" in values:
        return _alpaca(values)
    for question in ("prompt", "question"):
        if question in values:
            return _pair(values, question)
    there = ", ".join(map(str, values)) or "none"
    raise BadRow(f"has no conversation (its fields: {there}); rows are {SHAPES}.")


def _listed(value: Any, name: str) -> list[Any]:
    """A list; tables keep one as JSON in a cell."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise BadRow(f"has '{name}' that is no list of messages; write it as one.")
    return value


def _system(values: Mapping[str, Any]) -> Messages:
    text = values.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _sharegpt(turns: list[Any], name: str) -> Messages:
    found = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise BadRow(f"has a turn {number} in '{name}' that is no object; mend the row.")
        if "from" not in turn and "role" in turn:
            found.append(dict(turn))
            continue
        who = str(turn.get("from"))
        role = OTHER_NAMES.get(who.lower(), who.lower())
        found.append({"role": role, "content": turn.get("value")})
    return found


def _dialogue(turns: list[Any]) -> Messages:
    """Two speakers as user and assistant; what one of them says in a row is one message."""
    found: Messages = []
    speakers: list[Any] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("text"), str):
            raise BadRow(f"has an utterance {number} without a text; mend the row.")
        who = turn.get("interlocutor_id", turn.get("speaker"))
        if who not in speakers:
            speakers.append(who)
        if len(speakers) > 2:
            raise BadRow(f"has more than two speakers (utterance {number}); leave it out.")
        role = ("user", "assistant")[speakers.index(who)]
        if found and found[-1]["role"] == role:
            found[-1]["content"] += "\n" + turn["text"]
        else:
            found.append({"role": role, "content": turn["text"]})
    return found


def _alpaca(values: Mapping[str, Any]) -> Messages:
    names = ("chosen",) if "rejected" in values else ("output", "response", "chosen")
    name = next((n for n in names if n in values), names[0])
    extra = values.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRow("has an 'input' that is no text; write it as a text.")
    request = _request(_text(values, "instruction"), extra or "")
    answer = {"role": "assistant", "content": _text(values, name)}
    return [*_system(values), request, answer]


def _request(instruction: str, extra: str) -> dict[str, Any]:
    """The user's message; the template alpaca shows its two parts apart."""
    if not extra.strip():
        return {"role": "user", "content": instruction}
    both = f"{instruction}\n\n{extra}"
    return {"role": "user", "content": both, "instruction": instruction, "input": extra}


def _pair(values: Mapping[str, Any], question: str) -> Messages:
    names = ("response", "completion", "answer", "output", "chosen")
    name = next((n for n in names if n in values), None)
    if name is None:
        raise BadRow(f"has a '{question}' but none of {', '.join(names)}; name its answer so.")
    asked = values[question]
    if isinstance(asked, str) and (frame := FRAME.match(asked)):
        before: Messages = [_request(frame["instruction"], frame["input"] or "")]
    elif isinstance(asked, list):
        before = list(asked)
    else:
        before = [{"role": "user", "content": _text(values, question)}]
    answer = values[name]
    if isinstance(answer, list) and all(isinstance(one, Mapping) for one in answer):
        return [*_system(values), *before, *answer]
    return [*_system(values), *before, {"role": "assistant", "content": _text(values, name)}]


def _text(values: Mapping[str, Any], name: str) -> str:
    """What stands under a name; `BadRow` where that is no text or an empty one."""
    if name not in values:
        there = ", ".join(map(str, values)) or "none"
        raise BadRow(f"has no field '{name}' (its fields: {there}); rows are {SHAPES}.")
    value = values[name]
    if not isinstance(value, str):
        raise BadRow(f"has {value!r:.40} for '{name}', which is no text; write it as a text.")
    if not value.strip():
        raise BadRow(f"has an empty '{name}'; fill it in or leave the row out.")
    return value
