"""What a model is given: texts with the special tokens around them, as one padded batch.

An encoder reads `[CLS] text [SEP]`, or two texts in one row with a mark (the *segment*) that tells
them apart; T5 wants `text </s>`, RoBERTa two separators between a pair. The recipe is the
`post_processor` of a specification. Papers: Devlin et al. 2019, arXiv:1810.04805 (BERT); Liu et al.
2019, arXiv:1907.11692 (RoBERTa).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import REMEDY

if TYPE_CHECKING:
    from llm_from_scratch.text.tokenizer import Tokenizer

Part = tuple[str | list[int], int]  # "A", "B" or the ids of special tokens, and their segment


@dataclass(frozen=True)
class Encoded:
    """A batch of rows of equal length.

    Attributes:
        ids: (batch, time) token ids.
        mask: (batch, time) 1 for tokens, 0 for padding.
        segments: (batch, time) 0 for the first text of a pair and 1 for the second, where the
            model tells them apart.
    """

    ids: list[list[int]]
    mask: list[list[int]]
    segments: list[list[int]]

    def __len__(self) -> int:
        return len(self.ids)


def template(
    single: str, pair: str, names: Mapping[str, str], ids: Mapping[str, int], segments: bool
) -> dict[str, Any]:
    """A `post_processor` from lines such as "cls A sep" and "cls A sep B sep".

    `names` has the token of each role; one without an id is left out. With `segments` the second
    text and what follows it are of segment 1.
    """
    used: dict[str, int] = {}

    def parts(line: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        segment = 0
        for word in line.split():
            if word in ("A", "B"):
                segment = int(segments and word == "B")
                found.append({"Sequence": {"id": word, "type_id": segment}})
            elif (token := names.get(word)) in ids:
                used[str(token)] = ids[str(token)]
                found.append({"SpecialToken": {"id": token, "type_id": segment}})
        return found

    return {
        "type": "TemplateProcessing",
        "single": parts(single),
        "pair": parts(pair),
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in used.items()
        },
    }


def parts_of(processor: Mapping[str, Any] | None, pair: bool) -> list[Part]:
    """What a `post_processor` puts together, in order. `UserError` for one that makes no sense."""
    plain: list[Part] = [("A", 0), ("B", 1)] if pair else [("A", 0)]
    try:
        found = _parts(processor, pair) or plain
    except (KeyError, TypeError, ValueError, AttributeError):
        found = []
    texts = [what for what, _ in found if isinstance(what, str)]
    numbers = [n for what, _ in found if not isinstance(what, str) for n in what]
    sound = all(isinstance(n, int) and n >= 0 for n in [*numbers, *(s for _, s in found)])
    if sorted(texts) != ["A", "B"][: 1 + pair] or not sound:
        what = f"{processor!r:.80}"
        raise UserError(
            f"The 'post_processor' of this tokenizer cannot be used ({what}); {REMEDY}."
        )
    return found


def _parts(processor: Mapping[str, Any] | None, pair: bool) -> list[Part] | None:
    if processor is None or processor["type"] == "ByteLevel":  # only moves offsets
        return None
    kind = processor["type"]
    if kind == "Sequence":
        found = [_parts(step, pair) for step in processor["processors"]]
        return next((parts for parts in reversed(found) if parts), None)
    if kind == "TemplateProcessing":
        special = processor["special_tokens"]
        parts: list[Part] = []
        for part in processor["pair" if pair else "single"]:
            if "Sequence" in part:
                parts.append((str(part["Sequence"]["id"]), part["Sequence"]["type_id"]))
            else:
                entry = part["SpecialToken"]
                parts.append((list(special[entry["id"]]["ids"]), entry["type_id"]))
        return parts
    if kind not in ("BertProcessing", "RobertaProcessing"):
        raise ValueError(kind)
    first, last = [processor["cls"][1]], [processor["sep"][1]]
    if not pair:
        return [(first, 0), ("A", 0), (last, 0)]
    if kind == "BertProcessing":
        return [(first, 0), ("A", 0), (last, 0), ("B", 1), (last, 1)]
    return [(first, 0), ("A", 0), (last, 0), (last, 0), ("B", 0), (last, 0)]


def cut_to(first: int, second: int, room: int, *, odd_to_first: bool = False) -> tuple[int, int]:
    """How many tokens of each of two texts stay, the longer one giving way first.

    As the strategy "longest first" of the `tokenizers` package; if both are cut to halves of an odd
    number, the longer one keeps one more, or with `odd_to_first` the first (as `transformers` does
    where it tokenizes in Python).
    """
    if first + second <= room:
        return first, second
    short = min(first, second)
    long = max(short, room - short)
    if short + long > room:
        short = room // 2
        long = room - short
        if odd_to_first:
            return long, short
    return (long, short) if first > second else (short, long)


def assemble(
    first: Sequence[list[int]],
    second: Sequence[list[int]] | None,
    parts: list[Part],
    *,
    max_length: int | None,
    pad_id: int | None,
    pad_left: bool = False,
    odd_to_first: bool = False,
) -> Encoded:
    """Rows from the ids of texts (and of their partners), cut to `max_length` and padded.

    Raises `UserError` where `max_length` has no room for text, or there is nothing to pad with.
    """
    around = sum(len(what) for what, _ in parts if not isinstance(what, str))
    if max_length is not None and max_length <= around:
        raise UserError(
            f"max_length={max_length} leaves no room for text beside {around} special tokens: give "
            "more."
        )
    room = None if max_length is None else max_length - around
    rows: list[tuple[list[int], list[int]]] = []
    for number, ids in enumerate(first):
        texts = {"A": ids, "B": second[number] if second is not None else []}
        if room is not None:
            lengths = cut_to(len(ids), len(texts["B"]), room, odd_to_first=odd_to_first)
            for name, length in zip("AB", lengths, strict=True):
                texts[name] = texts[name][:length]
        row: list[int] = []
        segments: list[int] = []
        for what, segment in parts:
            new = texts[what] if isinstance(what, str) else what
            row += new
            segments += [segment] * len(new)
        rows.append((row, segments))
    return _padded(rows, pad_id, pad_left)


def _padded(rows: list[tuple[list[int], list[int]]], pad_id: int | None, left: bool) -> Encoded:
    length = max((len(row) for row, _ in rows), default=0)
    if pad_id is None and any(len(row) < length for row, _ in rows):
        raise UserError(
            "The texts differ in length, and this tokenizer has no token to pad them with: set "
            "'pad_token' in its config, or give one text at a time."
        )

    def fill(values: list[int], by: int) -> list[int]:
        padding = [by] * (length - len(values))
        return padding + values if left else values + padding

    return Encoded(
        ids=[fill(row, pad_id or 0) for row, _ in rows],
        mask=[fill([1] * len(row), 0) for row, _ in rows],
        segments=[fill(segments, 0) for _, segments in rows],
    )


def encode_inputs(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    *,
    max_length: int | None,
    special: bool,
) -> Encoded:
    """What `Tokenizer.encode_inputs` says."""
    if isinstance(texts, str) or isinstance(pairs, str):
        raise UserError("encode_inputs takes lists of texts: put a single text in a list.")
    if pairs is not None and len(pairs) != len(texts):
        raise UserError(
            f"There are {len(texts)} texts but {len(pairs)} to pair them with: give as many."
        )
    found = [
        [tokenizer.encode(text, special=True) for text in column]
        if special
        else tokenizer.encode_batch(column)
        for column in (texts, pairs or ())
    ]
    return assemble(
        found[0],
        None if pairs is None else found[1],
        parts_of(_processor(tokenizer), pairs is not None),
        max_length=max_length,
        pad_id=tokenizer.pad_id,
        pad_left=tokenizer.config.get("padding_side") == "left",
        odd_to_first=tokenizer.front is not None,
    )


def with_special(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids of one text with the special tokens that belong around it."""
    parts = parts_of(_processor(tokenizer), pair=False)
    return assemble([list(ids)], None, parts, max_length=None, pad_id=None).ids[0]


def put_around(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether the bos token is put before a text, and the eos token behind it."""
    parts = [what for what, _ in parts_of(tokenizer.rules.get("post_processor"), pair=False)]
    text = parts.index("A")
    before = [tokenizer.bos_id] in parts[:text]
    after = [tokenizer.eos_id] in parts[text:]
    config = tokenizer.config
    return bool(config.get("add_bos_token", before)), bool(config.get("add_eos_token", after))


def _processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The post-processor of a tokenizer; where only the config says what is put around, from it."""
    known: dict[str, Any] | None = tokenizer.rules.get("post_processor")
    if known is not None:
        return known
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    ids = {
        r: i for r, i in roles.items() if i is not None and tokenizer.config.get(f"add_{r}_token")
    }
    names = {role: role for role in ids}
    return template("bos A eos", "bos A eos bos B eos", names, ids, False) if ids else None
