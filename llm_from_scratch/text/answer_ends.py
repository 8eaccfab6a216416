"""Whether a chat template can be learnt from: its control tokens, and where an answer ends.

A model that is never taught the token behind its answers does not stop. Two things lead there: a
template that leaves that token out of what is learnt (or writes none), and a vocabulary that lacks
the template's control tokens, which then fall apart into letters.
"""

from __future__ import annotations

import re
from pathlib import Path

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.text.chat import encode_chat, render, template_of
from llm_from_scratch.text.chat_template import TEMPLATES, compiled
from llm_from_scratch.text.tokenizer import Tokenizer

# What templates write where a vocabulary has a token of its own for it.
CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>")
PROBE = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
)


def chosen_template(name: str | None, tokenizer: Tokenizer) -> str:
    """The Jinja of a named template, of a file, or as it is; without a name the tokenizer's own.

    Raises `UserError` for a name that is none, and for what is no Jinja.
    """
    if name is None or name in TEMPLATES:
        return template_of(tokenizer, name)
    if "{" not in name:
        if not Path(name).is_file():
            raise UserError(
                f"There is no chat template '{name}': give one of {', '.join(TEMPLATES)}, a file "
                f"with Jinja in it, or Jinja.{nearest(name, TEMPLATES)}"
            )
        try:
            name = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The chat template {name} cannot be read ({error}).") from None
    compiled(name)
    return name


def missing_tokens(template: str, tokenizer: Tokenizer) -> list[str]:
    """The control tokens that a template writes and the vocabulary does not have, in order."""
    bos, eos = (tokenizer.config.get(name) for name in ("bos_token", "eos_token"))
    text = render(PROBE, template, bos=bos or "", eos=eos or "", add_generation_prompt=True)
    found = dict.fromkeys(CONTROL.findall(text))
    return [token for token in found if token not in tokenizer.special_tokens]


def answer_end(template: str, tokenizer: Tokenizer, *, everything: bool = False) -> int:
    """The id of the token that the model learns to write behind its answer.

    With `everything` all tokens are learnt, not those of the answers alone. Raises `UserError` for
    a template with which no such token would be learnt.
    """
    tokens = encode_chat(tokenizer, PROBE, template=template)
    learnt = [place for place, on in enumerate(tokens.mask) if on]
    special = set(tokenizer.special_tokens.values())
    if learnt and tokens.ids[learnt[-1]] in special:
        return tokens.ids[learnt[-1]]
    behind = tokens.ids[learnt[-1] + 1 :] if learnt else []
    ends = [token for token in behind if token in special]
    if everything and ends:
        return ends[0]
    if ends:
        name = tokenizer.token_text(ends[0])
        raise UserError(
            f"The chat template writes {name} behind an answer but leaves it out of what is "
            "learnt, so the model would never stop: put it inside of {% generation %}, or learn "
            "from all tokens (--sft.loss_on all)."
        )
    if tokenizer.eos_id is None and "eos_token" in template:
        raise UserError(
            "The chat template ends an answer with the end-of-text token (eos), of which this "
            "vocabulary has none, so the model would never stop: take the template chatml with "
            "--sft.add_tokens true, or name one as eos_token in tokenizer_config.json."
        )
    raise UserError(
        "The chat template writes no control token behind an answer, so the model would never "
        "learn to stop: end the answer with {{ eos_token }}, or take a named template "
        f"({', '.join(TEMPLATES)})."
    )
