"""Settings: dataclasses <-> YAML <-> command line, with one set of rules for all three.

A run is one nested dataclass. Every field is a YAML key (`train: {max_steps: 200}`) and a flag
(`--train.max_steps 200`; `-` and `_` mean the same). Unknown keys, wrong types and bad values are
refused with the nearest valid name, before anything is computed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llm_from_scratch.core.errors import UserError, nearest

T = TypeVar("T")


def _plain_type(annotation: Any) -> tuple[Any, bool]:
    """(type, may be None): `int | None` -> (int, True)."""
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return options[0], True
    return annotation, False


def field_types(cls: type) -> dict[str, Any]:
    """Each field's annotation, resolved from its string."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _convert(value: Any, annotation: Any, where: str, default: Any = None) -> Any:
    """`value` from YAML or a flag as the annotated type, or a `UserError`.

    A part of the settings starts from `default`, which may differ from its class's own.
    """
    kind, optional = _plain_type(annotation)
    if value is None or (optional and value in ("none", "null", "None")):
        if optional:
            return None
        if not dataclasses.is_dataclass(kind):
            raise UserError(f"{where} needs a value.")
        value = {}  # a part with nothing in it, as flags find it
    if dataclasses.is_dataclass(kind):
        known = default if dataclasses.is_dataclass(default) else None
        return from_dict(typing.cast(type, kind), value, where, known)
    if typing.get_origin(kind) in (tuple, list):
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(v, typing.get_args(kind)[0], where) for v in items)
    if kind is bool:
        text = str(value).lower()
        if text in ("true", "yes", "on", "1"):
            return True
        if text in ("false", "no", "off", "0"):
            return False
        raise UserError(f"{where} is '{value}'; it must be true or false.")
    if kind is int:
        text = str(value).replace("_", "")
        if re.fullmatch(r"[+-]?\d{1,30}", text):
            return int(text)  # exactly: a float holds no more than 53 bits of it
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number) or number != int(number):
            raise UserError(f"{where} is '{value}'; it must be a whole number.")
        return int(number)
    if kind is float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number):
            raise UserError(f"{where} is '{value}'; it must be a number.")
        return number
    if isinstance(value, (dict, list)):
        raise UserError(f"{where} is a {type(value).__name__}; it must be plain text.")
    return str(value)


def defaults_of(config: Any) -> dict[str, Any]:
    """What each field of a dataclass, or of one of its instances, is unless told."""
    if not isinstance(config, type):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        f.name: f.default_factory() if callable(f.default_factory) else f.default
        for f in dataclasses.fields(config)
    }


def from_dict(cls: type[T], values: Any, where: str = "", default: T | None = None) -> T:
    """Build the dataclass `cls` from a nested mapping; unknown keys are refused by name.

    What `values` does not say is as in `default`, or as the class has it.
    """
    if dataclasses.is_dataclass(values) and isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'The settings'} must be a table of names and values.")
    annotations = field_types(cls)
    usual = defaults_of(cls if default is None else default)
    built: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        path = f"{where}.{name}" if where else name
        if name not in annotations:
            raise UserError(f"There is no setting '{path}'.{_suggest(path, cls, where)}")
        built[name] = _convert(value, annotations[name], path, usual[name])
    return cls(**built) if default is None else dataclasses.replace(default, **built)  # type: ignore[type-var]


def _suggest(path: str, cls: type, where: str) -> str:
    prefix = f"{where}." if where else ""
    return nearest(path, [prefix + name for name in (*field_types(cls), *leaf_fields(cls))])


def to_dict(config: Any) -> dict[str, Any]:
    """The nested mapping of a dataclass, with every field: what goes into config.yaml."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = [str(v) if isinstance(v, Path) else v for v in value]
        elif isinstance(value, Path):
            value = str(value)
        result[field.name] = value
    return result


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file, or a `UserError` that names the file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no settings file {path}; check the --config.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"The settings file {path} is not UTF-8 text; convert it.") from error
    except OSError as error:
        raise UserError(
            f"The settings file {path} cannot be read ({error.strerror}); give another --config."
        ) from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{line} is not valid YAML; mend or leave out --config.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a table such as 'train: {{max_steps: 100}}'.")
    return values


def leaf_fields(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings: train.max_steps, ..."""
    for name, annotation in field_types(cls).items():
        kind, _ = _plain_type(annotation)
        if dataclasses.is_dataclass(kind):
            yield from leaf_fields(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield prefix + name


def merge(base: Mapping[str, Any], over: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`base` with the values of `over`, part by part.

    Raises `UserError` where `base` has a single value and `over` a part, which would hide it.
    """
    result = dict(base)
    for key, value in over.items():
        known, path = result.get(key), f"{where}.{key}" if where else str(key)
        if isinstance(value, Mapping) and known is not None:
            if not isinstance(known, Mapping):
                raise UserError(f"{path} must be a table of names and values.")
            result[key] = merge(known, value, path)
        else:
            result[key] = value
    return result


def from_flags(flags: list[str], cls: type) -> dict[str, Any]:
    """`["--train.max_steps", "20", "--data.paths", "a", "b"]` -> nested mapping of texts."""
    known = set(leaf_fields(cls))
    result: dict[str, Any] = {}
    index = 0
    while index < len(flags):
        flag = flags[index]
        index += 1
        if not flag.startswith("--"):
            raise UserError(f"'{flag}' was not expected; settings look like --train.max_steps 20.")
        name, equals, inline = flag[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise UserError(f"There is no setting --{name}.{nearest(name, known)}")
        values = [inline] if equals else []
        while not equals and index < len(flags) and not flags[index].startswith("--"):
            values.append(flags[index])
            index += 1
        if not values:
            raise UserError(f"--{name} needs a value.")
        many = typing.get_origin(_plain_type(_annotation_of(cls, name))[0]) in (tuple, list)
        if len(values) > 1 and not many:
            raise UserError(f"--{name} takes one value, but got {len(values)}: {' '.join(values)}.")
        place = result
        *parts, last = name.split(".")
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = values if many else values[0]
    return result


def _annotation_of(cls: type, dotted: str) -> Any:
    annotation: Any = cls
    for part in dotted.split("."):
        annotation = field_types(_plain_type(annotation)[0])[part]
    return annotation


def field_help(cls: type) -> dict[str, str]:
    """The string under each field of the class body, or of a class before it: its description."""
    found: dict[str, str] = {}
    for parent in cls.__bases__:
        if dataclasses.is_dataclass(parent):
            found |= field_help(parent)
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # a class made at a prompt has no source file
        return found
    body = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(body, ast.ClassDef)
    for before, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[before.target.id] = " ".join(str(after.value.value).split())
    return found


def describe(cls: type, prefix: str = "", default: Any = None) -> list[tuple[str, str, str]]:
    """(flag, default, help) of every setting, for --help and the docs."""
    rows: list[tuple[str, str, str]] = []
    helps = field_help(cls)
    defaults = defaults_of(cls if default is None else default)
    for name, annotation in field_types(cls).items():
        kind, _ = _plain_type(annotation)
        if dataclasses.is_dataclass(kind):
            rows += describe(typing.cast(type, kind), f"{prefix}{name}.", defaults[name])
        else:
            default = defaults[name]
            shown = "" if default in (None, (), dataclasses.MISSING) else str(default)
            rows.append((prefix + name, shown, helps.get(name, "")))
    return rows


def settings_epilog(cls: type) -> str:
    """The settings of a run as text for `--help`."""
    lines = ["settings (as flags, or in a file given with --config):"]
    for flag, default, text in describe(cls):
        shown = f" (default {default})" if default else ""
        lines.append(f"  --{flag:<26} {text}{shown}")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are sentences, the same under every version of Python.

    `late_epilog` makes the last part of the help when somebody asks for it.
    """

    def __init__(
        self, *args: Any, late_epilog: Callable[[], str] | None = None, **kwargs: Any
    ) -> None:
        self.late_epilog = late_epilog
        # Flags are written out: an abbreviation would change its meaning with the next flag.
        if kwargs.get("description"):  # the examples behind it are kept as they are, so it is not
            kwargs["description"] = textwrap.fill(kwargs["description"], 79)
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def format_help(self) -> str:
        if self.late_epilog is not None:
            self.epilog = self.late_epilog()
        return super().format_help()

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{_reworded(message)} See {self.prog} --help.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, surplus = super().parse_known_args(args, namespace)
        if surplus:
            first = str(surplus[0]).partition("=")[0]
            if not first.startswith("-"):
                self.error(f"'{first}' was not expected here.")
            flags = [text for action in self._actions for text in action.option_strings]
            self.error(f"There is no flag {first}.{nearest(first, flags)}")
        return found, surplus


def _reworded(message: str) -> str:
    """argparse's messages in the words of the rest of this program."""
    for pattern, words in (
        (r"argument (\S+): invalid int value: (.*)", "{0} is {1}; it must be a whole number."),
        (r"argument (\S+): invalid float value: (.*)", "{0} is {1}; it must be a number."),
        (r"argument (\S+): expected (?:one|at least one) argument", "{0} needs a value."),
        (r"the following arguments are required: (.*)", "Missing: {0}."),
    ):
        if match := re.fullmatch(pattern, message):
            return words.format(*match.groups())
    match = re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message)
    if match:
        name, value, choices = match[1], match[2], match[3].replace("'", "").split(", ")
        must = f"it must be {', '.join(choices[:-1])} or {choices[-1]}."
        return f"{name} is '{value}'; {must}{nearest(value, choices)}"
    text = message[:1].upper() + message[1:]
    return text if text.endswith((".", "?")) else f"{text}."


def normalise_flags(arguments: list[str]) -> list[str]:
    """`--max-new-tokens 5` -> `--max_new_tokens 5`; everything after `--` is left alone."""
    result: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--":
            return result + arguments[index:]
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
        result.append(argument)
    return result
