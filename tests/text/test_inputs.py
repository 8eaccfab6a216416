"""Special tokens around texts, pairs, cutting and padding, without any model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.formats import added_token
from llm_from_scratch.text.inputs import (
    Encoded,
    assemble,
    cut_to,
    parts_of,
    put_around,
    template,
)
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.text.wordpiece_spec import wordpiece_spec

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "猫"]
IDS = {token: number for number, token in enumerate(TOKENS)}
ROLES = {"cls": "[CLS]", "sep": "[SEP]"}


def bert(**config: Any) -> Tokenizer:
    spec = wordpiece_spec(IDS)
    spec["added_tokens"] = [added_token(t, i, special=True) for t, i in list(IDS.items())[:5]]
    spec["post_processor"] = template("cls A sep", "cls A sep B sep", ROLES, IDS, True)
    return Tokenizer.from_spec(spec, config)


def test_a_batch_of_pairs() -> None:
    tokenizer = bert()
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id) == (2, 3, 4, 0)
    batch = tokenizer.encode_inputs(["the cat", "cats"], ["sat", ""])
    assert batch == Encoded(
        ids=[[2, 5, 6, 3, 7, 3], [2, 6, 8, 3, 3, 0]],
        mask=[[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]],
        segments=[[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0]],
    )
    assert len(batch) == 2
    assert tokenizer.encode_inputs([]) == Encoded([], [], [])
    assert tokenizer.encode_inputs(["the"], max_length=3).ids == [[2, 5, 3]]
    left = bert(padding_side="left").encode_inputs(["the cat", "cat"])
    assert left.ids == [[2, 5, 6, 3], [0, 2, 6, 3]]
    assert left.mask == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_special_tokens_in_a_users_text_stay_text() -> None:
    tokenizer = bert()
    (row,) = tokenizer.encode_inputs(["the [SEP] cat[MASK]"]).ids
    assert row.count(3) == 1
    assert 4 not in row
    (row,) = tokenizer.encode_inputs(["the [MASK] cat"], special=True).ids
    assert row == [2, 5, 4, 6, 3]


def test_without_a_post_processor_the_config_says_it() -> None:
    tokenizer = train_tokenizer(["some text"], vocab_size=258, special=["<s>", "</s>"])
    assert tokenizer.encode_inputs(["a"]).ids == [tokenizer.encode("a")]
    for end in (False, True):
        tokenizer.config |= {"add_bos_token": True, "add_eos_token": end}
        (row,) = tokenizer.encode_inputs(["a"], ["b"]).ids
        a, b, last = tokenizer.encode("a"), tokenizer.encode("b"), [1] * end
        assert row == [0, *a, *last, 0, *b, *last]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda t: t.encode_inputs("the cat"), "takes lists of texts"),
        (lambda t: t.encode_inputs(["a"], "b"), "takes lists of texts"),
        (lambda t: t.encode_inputs(["a", "b"], ["c"]), "2 texts but 1 to pair them with"),
        (lambda t: t.encode_inputs(["a"], max_length=2), "no room for text beside 2 special"),
        (lambda t: t.encode_inputs(["a"], ["b"], max_length=3), "no room for text beside 3"),
    ],
)
def test_asked_wrongly(asked: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        asked(bert())


def test_nothing_to_pad_with() -> None:
    tokenizer = train_tokenizer(["some text"], vocab_size=257)
    assert tokenizer.encode_inputs(["ab", "cd"]).mask == [[1, 1], [1, 1]]
    with pytest.raises(UserError, match="no token to pad them with: set 'pad_token'"):
        tokenizer.encode_inputs(["ab", "c"])


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 20))
def test_the_longer_text_gives_way_as_in_the_tokenizers_package(a: int, b: int, room: int) -> None:
    theirs = FastTokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    theirs.pre_tokenizer = __import__("tokenizers").pre_tokenizers.WhitespaceSplit()
    theirs.enable_truncation(room)
    found = theirs.encode(" ".join("x" * a), " ".join("x" * b)).type_ids
    assert cut_to(a, b, room) == (found.count(0), found.count(1))
    first, second = cut_to(a, b, room, odd_to_first=True)
    assert first + second == min(a + b, room)
    assert abs(first - second) <= max(abs(a - b), 1)


OLD = {"sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
LETTERS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}


@pytest.mark.parametrize(
    ("processor", "single", "pair"),
    [
        (None, [("A", 0)], [("A", 0), ("B", 1)]),
        (LETTERS, [("A", 0)], [("A", 0), ("B", 1)]),
        (
            {"type": "BertProcessing", **OLD},
            [([2], 0), ("A", 0), ([3], 0)],
            [([2], 0), ("A", 0), ([3], 0), ("B", 1), ([3], 1)],
        ),
        (
            {"type": "RobertaProcessing", **OLD, "trim_offsets": True, "add_prefix_space": False},
            [([2], 0), ("A", 0), ([3], 0)],
            [([2], 0), ("A", 0), ([3], 0), ([3], 0), ("B", 0), ([3], 0)],
        ),
        (
            {
                "type": "Sequence",
                "processors": [LETTERS, template("cls A", "cls A B", ROLES, IDS, False)],
            },
            [([2], 0), ("A", 0)],
            [([2], 0), ("A", 0), ("B", 0)],
        ),
    ],
)
def test_recipes(processor: Any, single: list, pair: list) -> None:
    assert parts_of(processor, False) == single
    assert parts_of(processor, True) == pair


GOOD = template("cls A sep", "cls A sep B sep", ROLES, IDS, True)
WRONG = (None, [], {}, "x", -1, 2.5, [{}], [["A"]], {"x": 1}, True)


def places(value: Any, path: tuple = ()) -> Any:
    yield path
    if isinstance(value, (dict, list)):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*path, key))


def test_recipes_that_make_no_sense_are_refused() -> None:
    refused = 0
    for path in list(places(GOOD))[1:]:
        for wrong in WRONG:
            processor = copy.deepcopy(GOOD)
            place: Any = processor
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            try:
                parts = parts_of(processor, True)
            except UserError as error:
                assert "'post_processor' of this tokenizer cannot be used" in str(error)
                refused += 1
            else:
                assemble([[5]], [[6]], parts, max_length=9, pad_id=0)
    assert refused > 100


def test_tokens_that_a_vocabulary_lacks_are_left_out() -> None:
    found = template("cls A sep", "cls A sep B sep", ROLES, {"[SEP]": 3}, False)
    assert parts_of(found, False) == [("A", 0), ([3], 0)]


def test_whether_a_text_begins_with_bos_and_ends_with_eos() -> None:
    """Whatever kind of recipe says it, unless the config says otherwise."""
    roles = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    assert put_around(bert()) == (False, False)  # [CLS] is no bos there
    tokenizer = bert(**roles)
    around, step = tokenizer.spec["post_processor"], {"type": "ByteLevel"}
    pair = {"sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    for recipe, wanted in (
        (around, (True, True)),
        (
            {"type": "Sequence", "processors": [step, tokenizer.spec["post_processor"]]},
            (True, True),
        ),
        ({"type": "RobertaProcessing", **pair}, (True, True)),
        (template("A sep", "A B sep", ROLES, IDS, False), (False, True)),
        (step, (False, False)),
        (None, (False, False)),
    ):
        tokenizer.rules["post_processor"] = recipe
        assert put_around(tokenizer) == wanted
    assert put_around(bert(**roles, add_bos_token=False)) == (False, True)
