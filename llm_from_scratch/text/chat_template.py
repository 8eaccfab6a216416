"""Chat templates: the Jinja programs in model folders that write messages as one text.

A template comes with a download, so it is untrusted code. It runs in Jinja's sandbox, set up as
`transformers` does, which keeps it from files and from Python's insides, and with limits on loops
and on the texts that it makes (`sandbox.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.parser import Parser

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.sandbox import (
    OUTPUT,
    Environment,
    budget,
    budgeted_range,
    make_environment,
)

# Private-use characters that stand around a {% generation %} block in what is rendered. Messages
# cannot contain them (see `chat.protect`).
OPEN, CLOSE = "\ue0f0", "\ue0f1"

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

# The frame of Stanford Alpaca. Its readers keep the parts of a request as `instruction` and `input`
# beside the content, which holds both for every other template.
ALPACA = """\
{%- if messages[0]['role'] not in ('system', 'developer') -%}
{{- 'Below is an instruction that describes a task. Write a response that appropriately ' -}}
{{- 'completes the request.\\n\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '### Response:\\n' -}}
{%- generation -%}{{- message['content'] + (eos_token or '') -}}{%- endgeneration -%}
{%- if not loop.last -%}{{- '\\n\\n' -}}{%- endif -%}
{%- elif message['role'] == 'user' -%}
{{- '### Instruction:\\n' + (message['instruction'] or message['content']) + '\\n\\n' -}}
{%- if message['input'] -%}{{- '### Input:\\n' + message['input'] + '\\n\\n' -}}{%- endif -%}
{%- else -%}
{{- message['content'] + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""

PHI3 = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

LLAMA3 = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

JAPANESE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'アシスタント：' -}}
{%- generation -%}{{- message['content'] + (eos_token or '') -}}{%- endgeneration -%}
{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}
{%- elif message['role'] == 'user' -%}
{{- 'ユーザ：' + message['content'] + '\\n' -}}
{%- else -%}
{{- message['content'] + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'アシスタント：' -}}{%- endif -%}
"""

# For models that bring none. "plain", "alpaca" and "japanese" end an answer with the vocabulary's
# end-of-text token and need no other; "plain" is what a base model gets. The rest need their
# control tokens in the vocabulary.
TEMPLATES = {
    "plain": PLAIN, "chatml": CHATML, "alpaca": ALPACA, "phi3": PHI3, "llama3": LLAMA3,
    "japanese": JAPANESE,
}  # fmt: skip


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


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return make_environment(extensions=[GenerationBlocks, "jinja2.ext.loopcontrols"])


@lru_cache(maxsize=32)
def compiled(template: str) -> jinja2.Template:
    """The template as a program; a `UserError` with the line where it is no valid Jinja."""
    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise UserError(
            f"The chat template is not valid Jinja (line {error.lineno}): {error.message}."
        ) from error
    except Exception as error:  # Python compiles what Jinja made of it, and has limits of its own
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
        with budget():
            blocks = program.generate({"range": budgeted_range(), **variables})
            return "".join(_limited(blocks))
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
        left -= len(block) + 1  # a loop that writes nothing must end, too
        if left < 0:
            raise SecurityError(f"it writes more than {OUTPUT:,} characters")
        yield block


def _refusal(error: SecurityError) -> str:
    text = _reason(error)
    return text if text.startswith("it ") else f"it reaches for what it may not use ({text})"


def _reason(error: BaseException) -> str:
    text = str(error).strip().rstrip(".") or type(error).__name__
    return " ".join(text.split())
