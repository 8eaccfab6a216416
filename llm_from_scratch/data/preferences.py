"""Preference data: a prompt, and two answers of which people liked one better.

Whatever a row looks like, it becomes {"prompt": messages, "chosen": text, "rejected": text}:

    prompt, chosen, rejected            texts; or messages, with answers as texts or messages
    chosen, rejected                    whole conversations as messages that differ in the end
    instruction, input, chosen, rejected        Alpaca with two answers
    chosen, rejected as "Human: ... Assistant: ..."    hh-rlhf's dialogues
    question, response_j, response_k    Stack Exchange: j was voted above k
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.chats import conversation_of
from llm_from_scratch.data.records import BadRow
from llm_from_scratch.text.chat import check_messages

Messages = list[dict[str, Any]]

SHAPES = (
    "prompt, chosen and rejected; instruction, input, chosen and rejected; chosen and rejected "
    "alone, as conversations; or question, response_j and response_k"
)
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def preference_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The row's prompt and answers; `BadRow` for what is no pair of different answers to one."""
    if "response_j" in values or "response_k" in values:
        names = ("question", "response_j", "response_k")
        question, better, worse = (field(values, name) for name in names)
        return _pair(messages_of(question, names[0]), better, worse, names[1:])
    chosen, rejected = (field(values, name) for name in ("chosen", "rejected"))
    if "instruction" not in values and "prompt" not in values:
        return _whole(chosen, rejected)
    asked = ("instruction", "input") if "instruction" in values else ("prompt",)
    kept = {name: values[name] for name in ("system", *asked) if name in values}
    return _pair(_asked(kept), chosen, rejected)


def _asked(values: dict[str, Any]) -> Messages:
    """The prompt of a row, read as sft reads it: what was learnt there is what is asked here."""
    prompt = values.get("prompt")
    if isinstance(prompt, str) and _is_dialogue(prompt):
        return messages_of(prompt, "prompt")
    answered = {**values, "response": "-"}
    return _prompt(list(conversation_of(answered)["messages"][:-1]), "prompt")


def field(values: Mapping[str, Any], name: str) -> Any:
    """What a row holds under a name; `BadRow` where that is nothing."""
    if name not in values:
        there = ", ".join(map(str, values)) or "none"
        raise BadRow(f"has no field '{name}' (its fields: {there}); rows are {SHAPES}.")
    if values[name] is None:
        raise BadRow(f"has nothing in '{name}'; fill it in or leave the row out.")
    return values[name]


def messages_of(value: Any, name: str) -> Messages:
    """A prompt as messages that end before the answer."""
    if isinstance(value, str):
        if _is_dialogue(value):
            turns = dialogue_turns(value, name)
            if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
                turns = turns[:-1]  # hh-rlhf prompts may end with "Assistant:"
            return _prompt(turns, name)
        if not value.strip():
            raise BadRow(f"has an empty '{name}'; fill it in or leave the row out.")
        return [{"role": "user", "content": value}]
    return _prompt(_messages(value, name), name)


def _whole(chosen: Any, rejected: Any) -> dict[str, Any]:
    """Two conversations that are the same up to their last answers."""
    sides = []
    for value, name in ((chosen, "chosen"), (rejected, "rejected")):
        if isinstance(value, str):
            if not _is_dialogue(value):
                raise BadRow(
                    f"has a '{name}' without its prompt; add the field 'prompt', or begin the text "
                    'with "Human:" and end it with "Assistant:" and the answer.'
                )
            sides.append(dialogue_turns(value, name))
        else:
            sides.append(_messages(value, name))
    better, worse = sides
    if better[:-1] != worse[:-1]:
        raise BadRow(
            "has two answers to different conversations; chosen and rejected must be the same up "
            "to their last message."
        )
    return _pair(_prompt(better[:-1], "chosen"), better[-1:], worse[-1:])


def _pair(
    prompt: Messages, chosen: Any, rejected: Any, names: Sequence[str] = ("chosen", "rejected")
) -> dict[str, Any]:
    answers = [_answer(value, name) for value, name in zip((chosen, rejected), names, strict=True)]
    if answers[0].strip() == answers[1].strip():
        raise BadRow(
            f"has the same text in '{names[0]}' and '{names[1]}', so there is nothing to prefer; "
            "leave it out."
        )
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def _answer(value: Any, name: str) -> str:
    """The text of an answer, given as text, as a message, or as a list of one message."""
    if not isinstance(value, str):
        turns = _messages([value] if isinstance(value, Mapping) else value, name)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise BadRow(
                f"has a '{name}' that is not one message of the assistant; give the last answer "
                "alone."
            )
        value = turns[0]["content"]
    if not value or not value.strip():
        raise BadRow(f"has an empty '{name}'; fill it in or leave the row out.")
    return str(value)


def _messages(value: Any, name: str) -> Messages:
    try:
        return check_messages(value)
    except UserError as error:
        raise BadRow(f"has no conversation in '{name}': {error}") from error


def _prompt(messages: Messages, name: str) -> Messages:
    """Messages that an answer can follow."""
    if not messages or messages[-1]["role"] in ("assistant", "system", "developer"):
        raise BadRow(f"has a '{name}' that does not end with a message to be answered.")
    return messages


def _is_dialogue(text: str) -> bool:
    return text.lstrip().startswith(("Human:", "Assistant:"))


def dialogue_turns(text: str, name: str) -> Messages:
    """hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages."""
    parts = _TURN.split(text.strip())
    turns = [
        {"role": _ROLES[who], "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    for number, turn in enumerate(turns[:-1], 1):
        if turn["role"] == turns[number]["role"]:
            raise BadRow(
                f"has two turns of one speaker in a row in '{name}' (turn {number}); join them or "
                "leave the row out."
            )
    return turns
