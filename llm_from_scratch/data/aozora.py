"""Aozora Bunko's text format: from an annotated file to the plain words of the work.

Format (https://www.aozora.gr.jp/annotation/): a head with title and author, a block between two
dashed lines that explains the signs, the work, and a colophon that begins with 底本：. Inside the
work:

- ``漢字《かんじ》`` and ``｜言葉《ことば》``: a reading (ruby) and where its base begins
- ``［＃…］``: a note on layout or on the printed edition
- ``※［＃「…」、第3水準1-85-57］``: a character that JIS X 0208 does not have (gaiji), described,
  with its Unicode number or its plane, row and cell in JIS X 0213 where these are known
- ``／＼`` and ``／″＼``: the repeat signs 〳〵 and 〴〵
"""

from __future__ import annotations

import re

GETA = "〓"  # the printer's placeholder for a character that the type case does not have

_EXPLANATION = "【テキスト中に現れる記号について】"
_RULE = re.compile(r"^-{20,}[ 　]*$", re.MULTILINE)
_COLOPHON = re.compile(r"^底本：", re.MULTILINE)
_RUBY = re.compile(r"《[^《》\n]*》")
_NOTE = re.compile(r"(※?)［＃([^［］]*)］")  # innermost: descriptions hold gaiji themselves
_UNICODE = re.compile(r"[Uu]\+([0-9A-Fa-f]{4,6})")
_CELL = re.compile(r"(?<![0-9-])([12])-([0-9]{1,2})-([0-9]{1,2})(?![0-9-])")


def is_aozora(text: str) -> bool:
    """Whether a text (line ends ``\\n``) is a file of Aozora Bunko, and not yet cleaned."""
    if _EXPLANATION in text[:4000]:
        return True
    colophon = text[_colophon_start(text) :]
    return "青空文庫" in colophon or (bool(colophon) and ("［＃" in text or "《" in text))


def clean_aozora(text: str) -> str:
    """The work alone: no head, explanation, colophon, ruby or notes; gaiji as characters.

    `text` has line ends ``\\n``. A gaiji of unknown number becomes 〓. Blanks at the ends of
    lines go, and several empty lines become one. The accent notation (``〔e'〕``) stays as it is.
    """
    body = text[_body_start(text) : _colophon_start(text)]
    body = _RUBY.sub("", body).replace("｜", "")
    count = 1
    while count:
        body, count = _NOTE.subn(_without_note, body)
    body = body.replace("／″＼", "〴〵").replace("／＼", "〳〵")
    body = re.sub(r"[ \t　]+$", "", body, flags=re.MULTILINE)
    body = re.sub(r"\n{3,}", "\n\n", body).strip("\n")
    return body + "\n" if body else ""


def gaiji(description: str) -> str | None:
    """The character that the inside of a ※［＃…］ note names, or None if it gives no number."""
    if found := _UNICODE.search(description):
        number = int(found[1], 16)
        if number <= 0x10FFFF and not 0xD800 <= number <= 0xDFFF:
            return chr(number)
    if found := _CELL.search(description):
        plane, row, cell = (int(part) for part in found.groups())
        prefix = b"" if plane == 1 else b"\x8f"
        try:
            return (prefix + bytes([0xA0 + row, 0xA0 + cell])).decode("euc_jis_2004")
        except ValueError:  # a place of the table that is empty, or outside of it
            return None
    return None


def _without_note(match: re.Match[str]) -> str:
    if not match[1]:
        return ""
    return gaiji(match[2]) or GETA


def _colophon_start(text: str) -> int:
    starts = [found.start() for found in _COLOPHON.finditer(text)]
    return starts[-1] if starts else len(text)


def _body_start(text: str) -> int:
    """Behind the explanation between two rules, or else behind the head's first empty line."""
    if _EXPLANATION in text[:4000]:
        rules = [found.end() for found in _RULE.finditer(text)]
        if len(rules) >= 2:
            return rules[1]
    head_end = max(0, text.find("\n\n"))
    lines = text[:head_end].split("\n")
    # Title, subtitle, author, translator; prose would be indented or end in a full stop.
    is_head = len(lines) <= 6 and not any(
        line.startswith("　") or line.endswith(("。", "」")) for line in lines
    )
    return head_end if is_head else 0
