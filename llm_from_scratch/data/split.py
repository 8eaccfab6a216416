"""Training and validation text: whole documents, or one document cut once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.read import Document


def split_documents(
    documents: Sequence[Document], val_fraction: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents; about `val_fraction` of the characters is validation.

    Documents stay whole: they are drawn in an order that depends on `seed` alone until the
    fraction is met as nearly as they allow. A single document is cut once, `val_fraction` before
    its end. Both sides keep the order of `documents`, and neither is ever empty, unless
    `val_fraction` is 0 and all is training.

    Raises `UserError` for a fraction outside of 0..1 and for text that cannot be divided.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction must be at least 0 and below 1, not {val_fraction}.")
    total = sum(len(document.text) for document in documents)
    if total == 0:
        raise UserError("The corpus holds no text; give files with text as --data.")
    if val_fraction == 0:
        return list(documents), []
    if len(documents) == 1:
        return _cut(documents[0], val_fraction)
    wanted, drawn, chosen = val_fraction * total, 0, set[int]()
    for number in drawing_order(len(documents), seed):
        size = len(documents[number].text)
        # Taken only if it brings the sum nearer to the mark: one huge document must not become
        # the whole validation side because it was drawn first.
        if abs(drawn + size - wanted) < abs(drawn - wanted) and drawn + size < total:
            chosen.add(number)
            drawn += size
    if not chosen:
        sizes = {n: len(d.text) for n, d in enumerate(documents) if d.text}
        if len(sizes) < 2:
            raise UserError("Only one document holds text; give it alone, or give more documents.")
        chosen.add(min(sizes, key=sizes.__getitem__))
    train = [document for n, document in enumerate(documents) if n not in chosen]
    return train, [documents[number] for number in sorted(chosen)]


def _cut(document: Document, val_fraction: float) -> tuple[list[Document], list[Document]]:
    size = len(document.text)
    place = size - max(1, round(val_fraction * size))
    if place < 1:
        raise UserError(
            f"{document.source} has only {size} characters: too few to keep {val_fraction:.0%} "
            "for validation; give more text or --data.val_fraction 0."
        )
    train, validation = document.text[:place], document.text[place:]
    return [Document(train, document.source)], [Document(validation, document.source)]


def drawing_order(count: int, seed: int) -> list[int]:
    """A permutation that no version of any library changes."""
    key = {n: hashlib.sha256(f"{seed}/{n}".encode()).digest() for n in range(count)}
    return sorted(range(count), key=key.__getitem__)
