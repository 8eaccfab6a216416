"""Several tokenizers beside each other on one text: how many tokens, and what gets lost.

Fewer tokens for the same bytes mean more text in a model's context and a faster model; but a
vocabulary that was made for other languages may cut a Japanese character into three.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import regex

from llm_from_scratch.text.tokenizer import Tokenizer, without_surrogates

CHUNK = 1 << 16  # characters that are encoded at a time; a longer text is cut at line ends
# Characters that Japanese is written with, its punctuation and full-width signs included.
JAPANESE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}ー　-〿！-･]+")
# The columns of the table, for a page and for a narrow terminal.
HEADS = {
    "tokenizer": "tokenizer",
    "vocabulary": "vocab",
    "tokens": "tokens",
    "bytes per token": "bytes/\ntoken",
    "characters per token": "chars/\ntoken",
    "unknown": "unknown",
    "tokens per Japanese character": "tokens/\nJA char",
    "round trip": "round\ntrip",
}


@dataclass(frozen=True)
class Comparison:
    """How one tokenizer fares with a text.

    Attributes:
        name, kind, vocab_size: which one it is.
        tokens: how many the text becomes; bytes (of UTF-8) and characters per token.
        unknown: tokens that stand for what the vocabulary cannot express; that text is lost.
        tokens_per_japanese_character: of the Japanese in the text, put together; None without any.
        round_trip: whether the tokens decode to exactly the text.
    """

    name: str
    kind: str
    vocab_size: int
    tokens: int
    bytes_per_token: float
    characters_per_token: float
    unknown: int
    tokens_per_japanese_character: float | None
    round_trip: bool

    def row(self) -> list[str]:
        """The values below `HEADS`, as texts."""
        japanese = self.tokens_per_japanese_character
        return [
            self.name,
            f"{self.vocab_size:,}",
            f"{self.tokens:,}",
            f"{self.bytes_per_token:.2f}",
            f"{self.characters_per_token:.2f}",
            f"{self.unknown:,}",
            "-" if japanese is None else f"{japanese:.2f}",
            "yes" if self.round_trip else "no",
        ]


def compare(
    name: str,
    tokenizer: Tokenizer,
    text: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Count what `tokenizer` makes of `text`; `progress(characters done, all)` is told of it."""
    text = without_surrogates(text)
    japanese = "".join(JAPANESE.findall(text))
    tokens = unknown = done = in_japanese = 0
    same = True
    for chunk in chunks(text):
        ids = tokenizer.encode(chunk)
        tokens += len(ids)
        unknown += 0 if tokenizer.unk_id is None else ids.count(tokenizer.unk_id)
        same = same and tokenizer.decode(ids) == chunk
        done += len(chunk)
        if progress:
            progress(done, len(text) + len(japanese))
    for chunk in chunks(japanese):
        in_japanese += len(tokenizer.encode(chunk))
        done += len(chunk)
        if progress:
            progress(done, len(text) + len(japanese))
    return Comparison(
        name=name,
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        tokens=tokens,
        bytes_per_token=len(text.encode()) / max(tokens, 1),
        characters_per_token=len(text) / max(tokens, 1),
        unknown=unknown,
        tokens_per_japanese_character=in_japanese / len(japanese) if japanese else None,
        round_trip=same,
    )


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of paths, where they still tell the names apart."""
    last = [name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or name for name in names]
    return last if len(set(last)) == len(set(names)) else list(names)


def chunks(text: str) -> Iterator[str]:
    """`text` in pieces of at most `CHUNK` characters, cut behind line ends where there are some."""
    start = 0
    while len(text) - start > CHUNK:
        end = text.rfind("\n", start, start + CHUNK) + 1 or start + CHUNK
        yield text[start:end]
        start = end
    if text[start:] or not start:
        yield text[start:]


def pieces(tokenizer: Tokenizer, text: str) -> list[dict[str, Any]]:
    """The tokens of `text`: their ids and what to print for each."""
    return [{"id": i, "text": tokenizer.token_text(i)} for i in tokenizer.encode(text)]


def as_json(comparison: Comparison, shown: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A comparison and the tokens of the excerpt as a JSON object."""
    values = {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in asdict(comparison).items()
    }
    return {**values, "excerpt": list(shown)}


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
div { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ccc; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
p.tokens { font-family: ui-monospace, monospace; line-height: 1.9; overflow-wrap: anywhere; }
p.tokens span { padding: .1rem 0; border-radius: .2rem; white-space: pre-wrap; }
.c0 { background: #cfe3f1; } .c1 { background: #f3dfc1; } .c2 { background: #d2ead4; }
.c3 { background: #ead3e8; }
@media (prefers-color-scheme: dark) {
  body { color: #eee; background: #16181b; } th, td { border-color: #444; }
  .c0 { background: #264653; } .c1 { background: #5f3b0f; } .c2 { background: #1f4d2b; }
  .c3 { background: #4a2545; }
}
"""


def page(
    title: str, comparisons: Sequence[Comparison], shown: Sequence[Sequence[dict[str, Any]]]
) -> str:
    """The table and the coloured tokens as one HTML page that needs nothing else."""
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in HEADS)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in comparison.row()) + "</tr>"
        for comparison in comparisons
    )
    texts = "\n".join(
        f"<h2>{html.escape(comparison.name)}</h2>\n<p class=tokens>{_spans(tokens)}</p>"
        for comparison, tokens in zip(comparisons, shown, strict=True)
    )
    return (
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n<div><table>\n<tr>{heads}</tr>\n{rows}\n"
        f"</table></div>\n{texts}\n"
    )


def _spans(tokens: Sequence[dict[str, Any]]) -> str:
    spans = []
    for number, token in enumerate(tokens):
        text = html.escape(token["text"])
        spans.append(f'<span class=c{number % 4} title="{token["id"]}">{text}</span>')
        if token["text"].endswith("\\n"):
            spans.append("<br>")
    return "<wbr>".join(spans)
