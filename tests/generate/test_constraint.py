"""Structured output: whatever an untrained model draws, it has the form that was asked for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.constraint import Constraint, check_form, make_constraint
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.generate.sampling import Chooser, SamplingSettings, make_generator
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer

WORD = {"type": "string", "maxLength": 8}
NAME = {"type": "string", "minLength": 1, "maxLength": 5}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def record(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object with these properties, all of them required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "string": WORD,
    "bounded string": {"type": "string", "minLength": 3, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[ぁ-ん]{2,4}(-[a-z]{1,3})?$"},
    "date": record({"day": {"type": "string", "format": "date"}}),
    "time and uuid": record(
        {"id": {"type": "string", "format": "uuid"}, "at": {"type": "string", "format": "time"}}
    ),
    "integer": {"type": "integer", "minimum": -20, "maximum": 300},
    "exclusive": {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 12},
    "multiple": {"type": "integer", "minimum": 0, "maximum": 90, "multipleOf": 15},
    "enum": {"enum": ["red", "緑", 3, None, True, {"deep": [1]}]},
    "const": record({"kind": {"const": "猫"}, "name": NAME}),
    "array": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 5},
    "tuple": {
        "type": "array",
        "prefixItems": [WORD, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    "nested arrays": {
        "type": "array",
        "maxItems": 3,
        "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "person": record(
        {
            "名前": NAME,
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": WORD, "maxItems": 3},
        }
    ),
    "optional": {
        "type": "object",
        "properties": {"a": DIGIT, "b": NAME, "c": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "any of": {"anyOf": [DIGIT, record({"x": DIGIT}), {"type": "null"}]},
    "one of": {"oneOf": [record({"cat": NAME}), record({"dog": DIGIT})]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]},
    "references": {
        "$defs": {"point": record({"x": DIGIT, "y": DIGIT})},
        **record({"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
    },
    "nested": record(
        {
            "title": {"type": "string", "maxLength": 10, "description": "日本語でも"},
            "parts": {
                "type": "array",
                "minItems": 1,
                "maxItems": 2,
                "items": record({"n": DIGIT, "said": {"type": ["string", "null"], "maxLength": 4}}),
            },
        }
    ),
}


@pytest.fixture(scope="module")
def writer(make: Callable[..., Decoder], tokenizer: Tokenizer) -> Decoder:
    """An untrained model whose logits are wider than the vocabulary, as many are."""
    return make(vocab_size=tokenizer.vocab_size + 5, max_seq_len=640)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_of_an_untrained_model_validates(
    name: str, writer: Decoder, tokenizer: Tokenizer
) -> None:
    schema = SCHEMAS[name]
    results = complete(
        writer,
        tokenizer,
        ["The king", "王様"],
        json_schema=schema,
        temperature=1.0,
        seed=1,
        n=13,
        max_new_tokens=600,
    )
    assert len(results) == 26
    for result in results:
        assert result.finish_reason == "stop"
        jsonschema.validate(json.loads(result.text), schema)
    assert len(SCHEMAS) * len(results) >= 500


def test_what_the_limit_cuts_says_so(writer: Decoder, tokenizer: Tokenizer) -> None:
    settings = {"json_schema": SCHEMAS["person"], "temperature": 1.0, "seed": 1}
    for result in complete(writer, tokenizer, ["a", "b"], max_new_tokens=9, **settings):
        assert result.finish_reason == "length"
        assert len(result.tokens) == 9


PATTERNS = [
    r"\d{3}-\d{4}",
    r"(はい|いいえ)、[ぁ-んァ-ヶ一-龠]{1,6}。",
    r'[a-z"\\/]{2,12}',
    r"(?i)yes|no",
    r"^\s?[^\n]{1,9}\n$",
    r"[😀-😎]{2}",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str, writer: Decoder, tokenizer: Tokenizer) -> None:
    for temperature in (0.0, 1.0):
        results = complete(
            writer, tokenizer, ["The"] * 12, regex=pattern, temperature=temperature, seed=2
        )
        for result in results:
            assert result.finish_reason == "stop"
            assert re.fullmatch(pattern, result.text), result.text


def test_choices(writer: Decoder, tokenizer: Tokenizer) -> None:
    choices = ("yes", "yes, but", "no", "かもしれない", 'a "b" \\ /c/\n')
    results = complete(
        writer, tokenizer, ["The"] * 60, choice=choices, temperature=3.0, seed=2, max_new_tokens=40
    )
    assert {result.text for result in results} == set(choices)
    assert all(result.finish_reason == "stop" for result in results)


def test_one_space_at_most(writer: Decoder, tokenizer: Tokenizer) -> None:
    """White space between values could go on for ever."""
    schema = record({"a": DIGIT, "b": {"type": "array", "items": DIGIT, "maxItems": 2}})
    for result in complete(writer, tokenizer, ["x"] * 20, json_schema=schema, temperature=1.0):
        found = json.loads(result.text)
        compact = json.dumps(found, separators=(",", ":"))
        assert re.sub("([:,]) ", r"\1", result.text) == compact


def written(constraint: Constraint, tokenizer: Tokenizer, seed: int, **values: Any) -> list[int]:
    """What random logits write, each token in its own place in the vocabulary."""
    chooser = Chooser(SamplingSettings(**values), make_generator(seed), [0], constraint)
    generator = make_generator(seed)
    ids: list[int] = []
    while not constraint.finished and len(ids) < 300:
        token = chooser.choose(torch.randn(tokenizer.vocab_size + 3, generator=generator))
        chooser.accept(token)
        if token not in tokenizer.stop_ids:
            ids.append(token)
    return ids


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_every_kind_of_vocabulary(kind: str) -> None:
    text = 'It said {"name": "むかし", "tags": ["x", "y"], "n": 0123456789}. ' * 9
    tokenizer = train_tokenizer([text], vocab_size=400, kind=kind)
    settings = SamplingSettings(json_schema=SCHEMAS["person"])
    if kind == "char":
        settings = SamplingSettings(json_schema=record({"name": {"enum": ["むかし", "x"]}}))
    for seed in range(5):
        constraint = make_constraint(settings, tokenizer, previous=tokenizer.bos_id)
        assert constraint is not None
        ids = written(constraint, tokenizer, seed)
        assert constraint.finished and constraint.complete
        assert settings.json_schema is not None
        jsonschema.validate(json.loads(tokenizer.decode(ids)), settings.json_schema)


def test_penalties_bias_and_ngrams_do_not_break_the_form(tokenizer: Tokenizer) -> None:
    digits = {"type": "array", "items": DIGIT, "minItems": 5, "maxItems": 9}
    schema = record({"a": digits, "b": digits})
    rules: list[dict[str, Any]] = [
        {"no_repeat_ngram": 1},
        {"repetition_penalty": 5.0, "temperature": 0.0},
        {"logit_bias": dict.fromkeys(range(20), 100), "frequency_penalty": 9.0},
        {"top_k": 1, "top_p": 0.01},
    ]
    for values in rules:
        constraint = make_constraint(SamplingSettings(json_schema=schema), tokenizer)
        assert constraint is not None
        ids = written(constraint, tokenizer, 1, **values)
        assert constraint.finished
        jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    constraint = make_constraint(SamplingSettings(regex=".{0,3}"), tokenizer)
    assert constraint is not None
    special = list(tokenizer.special_tokens.values())
    assert constraint.allowed(tokenizer.vocab_size)[special].tolist() == [
        token in tokenizer.stop_ids for token in special
    ]
    for token in tokenizer.encode("abc"):
        constraint.accept(token)
    allowed_v = constraint.allowed(tokenizer.vocab_size + 9)
    assert allowed_v.nonzero()[:, 0].tolist() == sorted(tokenizer.stop_ids)


def test_where_a_text_stands(tokenizer: Tokenizer) -> None:
    constraint = make_constraint(SamplingSettings(regex="ab?"), tokenizer)
    assert constraint is not None
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert not constraint.complete
    constraint.accept(*a)
    assert constraint.complete and not constraint.finished
    twin = constraint.copy()
    twin.accept(*b)
    assert twin.complete and twin.finished
    assert not constraint.finished and constraint.allowed(tokenizer.vocab_size)[b].all()
    constraint.accept(min(tokenizer.stop_ids))
    assert constraint.finished and constraint.complete and constraint.copy().finished


def test_without_an_end_token_a_text_ends_where_nothing_can_follow(tokenizer: Tokenizer) -> None:
    constraint = make_constraint(SamplingSettings(regex="ab"), tokenizer, stop_ids=())
    assert constraint is not None
    for token in [*tokenizer.encode("a"), *tokenizer.encode("b")]:
        assert not constraint.finished
        assert constraint.allowed(tokenizer.vocab_size)[token]
        constraint.accept(token)
    assert constraint.finished


def test_a_tokenizer_that_grew_is_read_again() -> None:
    tokenizer = train_tokenizer(["abc " * 30], vocab_size=260)
    settings = SamplingSettings(regex="(abcabc)+")
    assert make_constraint(settings, tokenizer) is not None
    tokenizer.add_tokens(["abcabc"])
    constraint = make_constraint(settings, tokenizer)
    assert constraint is not None
    assert constraint.allowed(tokenizer.vocab_size)[tokenizer.token_id("abcabc")]


def test_without_a_form_there_is_no_constraint(tokenizer: Tokenizer) -> None:
    assert make_constraint(SamplingSettings(), tokenizer) is None
    check_form(SamplingSettings())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"json_schema": {"type": "nonsense"}}, "Invalid type: nonsense"),
    ({"json_schema": '{"type": '}, "schema is not valid JSON: Expecting value"),
    ({"json_schema": "[1]"}, "it must be an object such as"),
    ({"json_schema": {"enum": {1, 2}}}, "set is not JSON serializable"),
    ({"json_schema": {"not": {"type": "string"}}}, r'Unimplemented keys: \["not"\]'),
    ({"json_schema": {"type": "string", "format": "zip"}}, "Unknown format: zip"),
    ({"json_schema": {"type": "string", "pattern": "(a"}}, "unclosed group"),
    ({"json_schema": {"$ref": "https://example.org/schema"}}, "is not present"),
    ({"json_schema": {"$ref": "#/$defs/gone"}}, "'/\\$defs/gone' does not exist"),
    ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 3}}, "greater than maxLength"),
    ({"regex": "a("}, "The pattern 'a\\(' is wrong, or asks for what is not supported: unclosed"),
    ({"regex": r"(?=a)a"}, "look-around"),
    ({"regex": "(" * 999 + ")" * 999}, "nested"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_wrong_form_is_refused_without_a_model(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_form(SamplingSettings(**values))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_schema_without_end_is_refused(tokenizer: Tokenizer) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(3000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(UserError, match="nests too deeply"):
        check_form(SamplingSettings(json_schema=deep))
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    with pytest.raises(UserError, match="the JSON schema asks for"):
        make_constraint(SamplingSettings(json_schema=loop), tokenizer)


def test_a_pattern_that_nothing_matches_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no text has that form"):
        make_constraint(SamplingSettings(regex="[a&&b]"), tokenizer)


def test_a_pattern_that_explodes_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="too many"):
        make_constraint(SamplingSettings(regex="((((a{99}){99}){99}){99})"), tokenizer)


def test_a_vocabulary_without_the_characters_is_refused() -> None:
    tokenizer = train_tokenizer(["only letters here "], vocab_size=60, kind="char")
    for values, lacking in (
        ({"json_schema": SCHEMAS["person"]}, "cannot write '{"),
        ({"choice": ["on", "off!"]}, "cannot write 'off!', as the choice asks"),
        ({"regex": "[0-9]{3}"}, "cannot begin what the pattern .* asks for"),
    ):
        with pytest.raises(UserError, match=lacking):
            make_constraint(SamplingSettings(**values), tokenizer)


def test_a_vocabulary_that_guesses_its_spaces_is_refused() -> None:
    tokenizer = train_tokenizer(["only letters here " * 9], vocab_size=60, kind="wordpiece")
    with pytest.raises(UserError, match="does not say which text its tokens stand for"):
        make_constraint(SamplingSettings(choice=("on",)), tokenizer)


def test_without_the_package_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'scratchlm\[structured\]'"):
        make_constraint(SamplingSettings(regex="a"), tokenizer)
