"""Rows with marked names, in the forms that people keep them in, as one form:

    {"text": ..., "entities": [[begin, end, type], ...], "words": [[begin, end], ...]}

Places count characters from 0, the end is not included. "words" is there only where the row says
what its words are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from llm_from_scratch.data.bio import Span, joined, spans_of_tags
from llm_from_scratch.data.records import BadRow

ENTITIES = ("entities", "spans", "label", "labels")  # annotation tools' names for them
TAGS = ("tags", "ner_tags", "labels", "label")
_BEGIN, _END = ("start", "begin", "start_offset"), ("end", "stop", "end_offset")
_TYPE = ("type", "label", "entity_group", "entity", "tag")


def entity_row(values: Mapping[str, Any], text_field: str, entities_field: str) -> dict[str, Any]:
    """A row in the one form; `BadRow` for one that cannot be used.

    It may have a text and spans: [begin, end, type], or objects with `start`, `end` and `label`, or
    with `span: [begin, end]` and `type`. Or it has `tokens` and as many `tags` (BIO, BIOES, IOB1).
    """
    if text_field not in values and "tokens" in values:
        return _from_tags(values, entities_field)
    text = values.get(text_field)
    if not isinstance(text, str):
        raise BadRow(f"has no text in '{text_field}'; name the field with --ner.text_field.")
    if not text.strip():
        raise BadRow(f"has nothing but white space in '{text_field}'; give it a text.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow(f"has half a character (a surrogate) in '{text_field}'; mend the text.")
    names = dict.fromkeys([entities_field, *ENTITIES])
    field = next((name for name in names if isinstance(values.get(name), list)), None)
    if field is None:
        raise BadRow(
            f"has no list of entities in '{entities_field}' (an empty one where there are none); "
            "name the field with --ner.entities_field."
        )
    spans = sorted(_span(text, entity) for entity in values[field])
    for (a, b, _), (c, d, _) in pairwise(spans):
        if c < b:
            raise BadRow(
                f"has two entities in one place, '{text[a:b]}' and '{text[c:d]}'; a tag can mark "
                "only one: leave the inner one out."
            )
    row: dict[str, Any] = {"text": text, "entities": [list(span) for span in spans]}
    if "words" in values:
        row["words"] = _places(text, values["words"])
    return row


def _span(text: str, entity: Any) -> Span:
    name = None
    if isinstance(entity, Mapping):
        place = entity.get("span")
        if not isinstance(place, list):
            place = [_first(entity, _BEGIN), _first(entity, _END)]
        kind = _first(entity, _TYPE)
        name = entity.get("name", entity.get("text"))
    elif isinstance(entity, list) and len(entity) == 3:
        place, kind = entity[:2], entity[2]
    else:
        place, kind = [], None
    whole = len(place) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in place)
    if not whole or not isinstance(kind, str) or not kind.strip():
        raise BadRow(
            f"has the entity {entity!r:.80}, which is neither [begin, end, type] nor an object "
            "with start, end and label; mend it."
        )
    begin, end = place
    if not 0 <= begin < end <= len(text):
        raise BadRow(
            f"has an entity at [{begin}, {end}], but the text has {len(text)} characters; places "
            "count characters from 0, and the end is not included."
        )
    if isinstance(name, str) and text[begin:end] != name:
        raise BadRow(
            f"calls the entity at [{begin}, {end}] {name!r:.40}, but {text[begin:end]!r:.40} "
            "stands there; places count characters from 0."
        )
    while begin < end and text[begin].isspace():
        begin += 1
    while end > begin and text[end - 1].isspace():
        end -= 1
    if begin == end:
        raise BadRow(f"has an entity at {place} that is nothing but white space; take it out.")
    return begin, end, kind.strip()


def _first(entity: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((entity[name] for name in names if name in entity), None)


def _places(text: str, words: Any) -> list[list[int]]:
    found: list[list[int]] = []
    for place in words if isinstance(words, list) else [None]:
        numbers = place if isinstance(place, list) else []
        before = found[-1][1] if found else 0
        sound = [type(n) for n in numbers] == [int, int]
        if not sound or not before <= numbers[0] < numbers[1] <= len(text):
            raise BadRow(
                f"has {place!r:.40} among its 'words', which must be [begin, end] in the order of "
                "the text; mend it or leave 'words' out."
            )
        found.append(numbers)
    return found


def _from_tags(values: Mapping[str, Any], entities_field: str) -> dict[str, Any]:
    words = values["tokens"]
    fields = (values.get(name) for name in (entities_field, *TAGS))
    tags: list[Any] = next((found for found in fields if isinstance(found, list)), [])
    for what, cells in (("tokens", words), ("tags", tags)):
        if not isinstance(cells, list) or not all(isinstance(x, str) and x.strip() for x in cells):
            raise BadRow(f"has '{what}' that are no list of texts (none of them empty); mend it.")
    if len(words) != len(tags) or not words:
        raise BadRow(f"has {len(words)} tokens and {len(tags)} tags; give a tag for each token.")
    text, places = joined([word.strip() for word in words])
    try:
        found = spans_of_tags(tags)
    except ValueError as error:
        raise BadRow(f"has the tag '{error}'; it must be O, or one such as B-PER.") from None
    return {
        "text": text,
        "entities": [[places[a][0], places[b - 1][1], kind] for a, b, kind in found],
        "words": [list(place) for place in places],
    }
