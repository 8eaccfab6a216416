"""Jinja's sandbox with a budget: where a chat template, which comes with a download, is run.

The sandbox keeps a template from files and from Python's insides, but lets it make a gigabyte out
of thirty characters: doubling a text thirty times is enough. So every way in which a template can
make a text out of others (operators, `~`, methods, filters, blocks, printing a list) goes through
`spend`, before the text exists where its size can be told in advance. One rendering has one budget.
"""

from __future__ import annotations

import functools
import json
import operator
import re
import types
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.filters
import jinja2.sandbox
from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context

LOOPS = 100_000  # numbers that all range() calls of one rendering may give together
LENGTH = 1_000_000  # of a text or list made by *, and bits of a number made by * or **
OUTPUT = 20_000_000  # characters of a rendered conversation, and of every text on the way to it
WORK = 20 * OUTPUT  # characters that one rendering may make, all texts on the way together
ELEMENT = 50  # what an element of a list counts beside its text

_left: ContextVar[list[int] | None] = ContextVar("_left", default=None)


@contextmanager
def budget() -> Iterator[None]:
    """One rendering: what is made in the block counts towards `WORK`."""
    token = _left.set([WORK])
    try:
        yield
    finally:
        _left.reset(token)


def spend(characters: int) -> None:
    """Count a text that was or will be made; `SecurityError` where it is too much."""
    if characters > OUTPUT:
        raise SecurityError("it makes a huge text")
    if (left := _left.get()) is not None:
        left[0] -= characters
        if left[0] < 0:
            raise SecurityError(f"it makes texts of more than {WORK:,} characters on its way")


def measure(*values: Any) -> int:
    """About how many characters the values are when printed; counting stops beyond `OUTPUT`.

    A list of one list twice, thirty times over, is small in memory and huge in print: so this
    walks it as printing would. An element counts `ELEMENT` more, as it takes memory and time, too.
    """
    size, left = 0, list(values)
    while left and size <= OUTPUT:
        value = left.pop()
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Mapping):
            size += 2 * ELEMENT * len(value)
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            size += ELEMENT * len(value)
            left += value
        else:
            size += ELEMENT
    return size


def text_of(value: Any) -> str:
    """`str(value)`, which for a list is the text of all that it holds."""
    if isinstance(value, str):
        return value
    spend(measure(value))
    text = str(value)
    spend(len(text))  # backslashes and unprintable characters are written longer
    return text


def joined(parts: Iterable[Any], between: str = "") -> str:
    """The texts of `parts` in one."""
    texts = [text_of(part) for part in parts]
    spend(sum(map(len, texts)) + len(between) * len(texts))
    return between.join(texts)


def replaced(text: str, old: str, new: str, count: int = -1) -> str:
    """`text.replace`."""
    found = text.count(old) if count < 0 else min(count, text.count(old))
    spend(len(text) + found * len(new))
    return text.replace(old, new, count)


def check_widths(pattern: Any) -> None:
    """Refuse format strings such as '%999999999d', and widths taken from an argument."""
    if isinstance(pattern, str) and re.search(r"[%{][^a-zA-Z}]*(\d{5}|\*|\{)", pattern):
        raise SecurityError("it pads a text to a huge width")


def percent(pattern: Any, values: Any) -> Any:
    """`pattern % values`, for texts and for numbers."""
    if isinstance(pattern, str):
        check_widths(pattern)
        spend(len(pattern) + pattern.count("%") * measure(values))
    return pattern % values


# ------------------------------------------------------------------------- the environment


class Generator(CodeGenerator):
    """Jinja's compiler, which calls the environment for `a ~ b` and `a[1:]` as well."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.cut(")
        self.visit(node.node, frame)
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            self.write(", ")
            if bound is None:
                self.write("None")
            else:
                self.visit(bound, frame)
        self.write(")")


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, which also refuses to make something huge from a few characters."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = Generator
    concat = staticmethod(joined)  # of what blocks and macros hold
    joined = staticmethod(joined)

    @staticmethod
    def cut(value: Any, start: Any, stop: Any, step: Any) -> Any:
        part = value[start:stop:step]
        spend(measure(part))
        return part

    def call_binop(self, context: Any, operator_name: str, left: Any, right: Any) -> Any:
        if operator_name == "%":
            return percent(left, right)
        if operator_name == "**":
            if isinstance(left, int) and left.bit_length() * abs(right) > LENGTH:
                raise SecurityError("it makes a huge number")
            return left**right
        if operator_name == "+":
            if isinstance(left, str | list | tuple):
                spend(measure(left, right))
            return left + right
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > LENGTH:
                raise SecurityError("it makes a huge number")
            return left * right
        for one, other in ((left, right), (right, left)):
            if hasattr(one, "__len__"):
                times = max(operator.index(other), 0)
                if len(one) * times > LENGTH:
                    raise SecurityError("it makes a huge text")
                spend(times * measure(one))
        return left * right

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING:
            return False
        if isinstance(obj, int | bytes) and callable(value):  # (1).to_bytes(10**10)
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """Jinja calls this for every attribute; here every method of a text is counted."""
        owner, name = getattr(value, "__self__", None), getattr(value, "__name__", "")
        if not isinstance(owner, str) or name in _PADDING or name.startswith("_"):
            return None
        if not isinstance(value, types.BuiltinMethodType | types.MethodType):
            return None
        if name == "replace":
            return functools.partial(replaced, owner)
        if name == "join":
            return lambda parts: owner.join(_only_texts(parts, len(owner)))
        if name in ("format", "format_map"):
            return _formatter(owner, super().wrap_str_format(value))
        return counted(value)


_PADDING = ("ljust", "rjust", "center", "zfill", "expandtabs", "translate", "encode")


def _only_texts(parts: Iterable[Any], between: int) -> list[Any]:
    texts = list(parts)
    spend(measure(*texts) + between * len(texts))
    return texts


def _formatter(pattern: str, formatted: Any) -> Callable[..., str]:
    def wrapper(*args: Any, **kwargs: Any) -> str:
        check_widths(pattern)
        spend(len(pattern) + pattern.count("{") * measure(args, kwargs))
        return str(formatted(*args, **kwargs))

    return wrapper


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose result is counted: for those that make a text about as long as theirs."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, str | list):
            spend(measure(result))
        return result

    return wrapper


class Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it sets '{name}'")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


# ------------------------------------------------------------------------- filters and functions
# With `pass_context` Jinja does not compute them while it compiles, when there is no budget.


@pass_context
def _finalize(context: Context, value: Any) -> str:
    """What {{ value }} writes."""
    return text_of(value)


@pass_context
def _string(context: Context, value: Any) -> str:
    return text_of(value)


@pass_context
def _join(context: Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(context.environment, attribute), value)
    return joined(value, text_of(d))


@pass_context
def _replace(context: Context, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    return replaced(text_of(s), text_of(old), text_of(new), -1 if count is None else count)


@pass_context
def _format(context: Context, value: Any, *args: Any, **kwargs: Any) -> str:
    return str(percent(text_of(value), kwargs or args))


@pass_context
def _list(context: Context, value: Iterable[Any]) -> list[Any]:
    items = []
    for item in value:
        spend(measure(item))
        items.append(item)
    return items


@pass_context
def _sum(context: Context, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    if attribute is not None:
        iterable = map(jinja2.filters.make_attrgetter(context.environment, attribute), iterable)
    if not isinstance(start, int | float):
        raise SecurityError("it adds up what are no numbers")
    return sum(iterable, start)


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    if abs(precision) > 100:
        raise SecurityError("it makes a huge number")
    return jinja2.filters.do_round(value, precision, method)


@pass_context
def _to_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > 100:
        raise SecurityError("it indents by a huge width")
    spend(measure(value))
    pieces, size = [], 0
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    for piece in encoder.iterencode(value):  # a piece at a time, because indents are not measured
        pieces.append(piece)
        size += len(piece)
        if size > OUTPUT:
            break
    spend(size)
    return "".join(pieces)


def _dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    spend(measure(args, kwargs))
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 1000:
        raise SecurityError("it makes a huge text")
    return datetime.now().strftime(pattern)


def make_environment(**settings: Any) -> Environment:
    """The sandbox with the filters and functions that chat templates use."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, finalize=_finalize, **settings)
    # They pad or repeat, and nobody needs them.
    for name in (
        "center", "slice", "batch", "indent", "wordwrap", "pprint", "urlize", "xmlattr",
    ):  # fmt: skip
        del environment.filters[name]
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]
    for name, function in environment.filters.items():
        environment.filters[name] = counted(function)
    environment.filters |= {
        "string": _string, "join": _join, "replace": _replace, "format": _format, "list": _list,
        "sum": _sum, "round": _round, "tojson": _to_json,
    }  # fmt: skip
    environment.globals |= {
        "dict": _dict, "namespace": Namespace, "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }  # fmt: skip
    return environment


def budgeted_range() -> Callable[..., range]:
    """A `range` for one rendering, whose results together have at most LOOPS numbers."""
    left = LOOPS

    def limited(*args: int) -> range:
        nonlocal left
        numbers = range(*args)
        left -= min(len(numbers), LOOPS + 1)
        if left < 0:
            raise SecurityError(f"it counts beyond {LOOPS:,} in its loops")
        return numbers

    return limited
