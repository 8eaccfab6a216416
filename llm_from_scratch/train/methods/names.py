"""The methods' names: which module holds each, and what the help says of it before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """Where a method is, what it is for, and how it is called."""

    module: str
    cls: str
    purpose: str
    examples: tuple[str, ...]


METHODS: dict[str, Name] = {
    "sft": Name(
        "sft",
        "Sft",
        "learn to answer, from instructions and chats",
        (
            "scratchlm finetune sft smollm2-135m --data chats.jsonl --out runs/chat",
            "scratchlm finetune sft smollm2-135m --data chats.jsonl --lora.rank 16 --out runs/lora",
        ),
    ),
}
