"""Chat templates: the Jinja programs in model folders that write messages as one text.

A template comes with a download, so it is untrusted code. It runs in Jinja's sandbox, set up as
`transformers` does, which keeps it from files and from Python's insides. The limits on loops,
repetition and output on top of that stop the plain ways of never ending; a template is no place
for a careful attacker's patience, so take models from where you trust.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.parser import Parser

from llm_from_scratch.core.errors import UserError

# Private-use characters that stand around a {% generation %} block in what is rendered. Messages
# cannot contain them (see `chat.protect`).
OPEN, CLOSE = "\ue0f0", "\ue0f1"

LOOPS = 100_000  # numbers that all range() calls of one rendering may give together
LENGTH = 1_000_000  # of a text or list made by *, and bits of a number made by **
OUTPUT = 50_000_000  # characters of a rendered conversation

PLAIN = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Assistant:' -}}
{%- generation -%}
{{- ' ' + message['content'] | trim + (eos_token or '' if loop.last else '\\n') -}}
{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}
{{- 'User: ' + message['content'] | trim + '\\n' -}}
{%- else -%}
{{- message['content'] | trim + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# For models that bring none: "plain" needs no special tokens and is what a base model gets;
# "chatml" needs <|im_start|> and <|im_end|> in the vocabulary.
TEMPLATES = {"plain": PLAIN, "chatml": CHATML}


class GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model is to learn to write."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, which also refuses to make something huge from a few characters."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator_name: str, left: Any, right: Any) -> Any:
        if operator_name == "%":
            check_widths(left)
            return left % right
        if operator_name == "**":
            if isinstance(left, int) and left.bit_length() * abs(right) > LENGTH:
                raise SecurityError("it makes a huge number")
            return left**right
        for one, other in ((left, right), (right, left)):
            if hasattr(one, "__len__") and len(one) * operator.index(other) > LENGTH:
                raise SecurityError("it makes a huge text")
        return left * right

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in ("ljust", "rjust", "center", "zfill", "expandtabs"):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        if getattr(value, "__name__", "") in ("format", "format_map"):
            check_widths(getattr(value, "__self__", None))
        return super().wrap_str_format(value)


class Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it sets '{name}'")
        super().__setitem__(name, value)


def check_widths(pattern: Any) -> None:
    """Refuse format strings such as '%999999999d', and widths taken from an argument."""
    if isinstance(pattern, str) and re.search(r"[%{][^a-zA-Z}]*(\d{5}|\*|\{)", pattern):
        raise SecurityError("it pads a text to a huge width")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > 100:
        raise SecurityError("it indents by a huge width")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _format(pattern: str, *args: Any, **kwargs: Any) -> str:
    check_widths(pattern)
    return str(pattern) % (kwargs or args)


def _budgeted_range() -> Callable[..., range]:
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


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlocks, "jinja2.ext.loopcontrols"],
    )
    for name in ("center", "slice", "batch", "indent", "wordwrap"):  # they pad, and nobody needs it
        del environment.filters[name]
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]
    environment.filters["tojson"] = _to_json
    environment.filters["format"] = _format
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = Namespace
    return environment


@lru_cache(maxsize=32)
def compiled(template: str) -> jinja2.Template:
    """The template as a program; a `UserError` with the line where it is no valid Jinja."""
    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise UserError(
            f"The chat template is not valid Jinja (line {error.lineno}): {error.message}."
        ) from error
    except (TemplateError, RecursionError, MemoryError, OverflowError) as error:
        raise UserError(f"The chat template cannot be used: {_reason(error)}.") from error


def marks_generation(template: str) -> bool:
    """Whether the template says itself, with {% generation %}, what the model writes."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def run_template(template: str, variables: Mapping[str, Any]) -> str:
    """Render; {% generation %} blocks come out between OPEN and CLOSE.

    Raises `jinja2.TemplateError` where the template itself calls `raise_exception`, and
    `UserError` where it is refused or broken.
    """
    program = compiled(template)
    try:
        return "".join(_limited(program.generate({"range": _budgeted_range(), **variables})))
    except SecurityError as error:
        raise UserError(
            f"The chat template was refused because {_refusal(error)}; use a model folder that "
            "you trust, or another template."
        ) from error
    except TemplateError as error:
        if type(error) is TemplateError:  # raise_exception: the template dislikes the messages
            raise
        raise UserError(f"The chat template failed: {_reason(error)}.") from error
    except UserError:
        raise
    except Exception as error:  # a template is a program: it can fail in every way there is
        raise UserError(f"The chat template failed: {_reason(error)}.") from error


def _limited(blocks: Iterator[str]) -> Iterator[str]:
    left = OUTPUT
    for block in blocks:
        left -= len(block)
        if left < 0:
            raise SecurityError(f"it writes more than {OUTPUT:,} characters")
        yield block


def _refusal(error: SecurityError) -> str:
    text = _reason(error)
    return text if text.startswith("it ") else f"it reaches for what it may not use ({text})"


def _reason(error: BaseException) -> str:
    text = str(error).strip().rstrip(".") or type(error).__name__
    return " ".join(text.split())
