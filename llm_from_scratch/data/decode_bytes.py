"""Bytes to text when nobody says which encoding: exactly, or not at all.

Nothing here ever replaces a byte by a question mark. Data either decodes without loss under an
encoding for which there is evidence, or a `UserError` names the byte at which it does not.

Order of evidence: a byte order mark; ISO-2022-JP's escape sequences; valid UTF-8 (other encodings
almost never are by accident); Shift_JIS or EUC-JP if the result reads like Japanese; Latin-1 or
Windows-1252 if the bytes above 127 stand alone among ASCII letters, as accents do.
"""

from __future__ import annotations

import codecs
import re

from llm_from_scratch.core.errors import UserError

NUL_SHARE = 0.001  # more NUL bytes than this and a file is no text; fewer are an accident
SAMPLE = 1 << 16  # characters that are looked at to judge how Japanese a text is

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# The later members of a family know more characters and are tried only where the first fails.
_ISO_2022 = ("iso2022_jp", "iso2022_jp_2004", "iso2022_jp_ext")
_JAPANESE = (("cp932", "shift_jis_2004"), ("euc_jp", "euc_jis_2004"))
_NAMES = {"cp932": "Shift_JIS", "euc_jp": "EUC-JP", "iso2022_jp": "ISO-2022-JP", "utf-8": "UTF-8"}

_HIGH = bytes(range(128, 256))
_KANA = re.compile(r"[\u3000-\u3020\u3031-\u3035ぁ-ゖァ-ヺー・（）［］！？：―…０-９]")
_ODD = re.compile(r"[\uff61-\uff9f\ue000-\uf8ff\u0080-\u009f]")  # half-width, private, controls
_ESCAPES = re.compile(rb"\x1b\$[@B(]")  # the switch to kanji: no other text has these three bytes
_UNDEFINED = re.compile("[\u0080\uf8f0-\uf8f3]")  # bytes 80, A0 and FD to FF of Shift_JIS
_ISOLATED = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])")
_CONTROLS = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")


class DamagedUtf8(UserError):
    """UTF-8 in which some bytes cannot be decoded."""


def decode_rows(data: bytes, name: str) -> tuple[str, bool]:
    """Like `decode_text`, for data whose rows are judged one by one: (text, whether damaged).

    In damaged UTF-8 each byte that cannot be decoded is a lone surrogate, U+DC80 to U+DCFF.
    """
    try:
        return decode_text(data, name)[0], False
    except DamagedUtf8:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape"), True


def decode_text(data: bytes, name: str) -> tuple[str, str]:
    """The text in `data` and the name of its encoding.

    `name` is what messages call the data. Line ends and NUL characters are left as they are; a
    byte order mark is removed. Raises `UserError` with the position of the first byte that cannot
    be decoded, or for data that is no text.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _strict(data, encoding, name, skip=len(mark)), encoding
    nuls = data.count(0)
    if nuls > max(1, NUL_SHARE * len(data)):
        raise UserError(f"{name}: {nuls:,} of {len(data):,} bytes are NUL, so this is not text.")
    if _ESCAPES.search(data):
        return _first_that_decodes(data, _ISO_2022, name)
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        _refuse_broken_utf8(data, error, name)
    return _legacy(data, name)


def _strict(data: bytes, encoding: str, name: str, skip: int = 0) -> str:
    try:
        return data[skip:].decode(encoding)
    except UnicodeDecodeError as error:
        raise _broken(error, encoding, name, skip) from None


def _first_that_decodes(data: bytes, encodings: tuple[str, ...], name: str) -> tuple[str, str]:
    """Decode with the first encoding of a family that can; the error is the family's first."""
    first_error: UnicodeDecodeError | None = None
    for encoding in encodings:
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError as error:
            first_error = first_error or error
    assert first_error is not None
    raise _broken(first_error, encodings[0], name) from None


def _broken(error: UnicodeDecodeError, encoding: str, name: str, skip: int = 0) -> UserError:
    """The sentence for data that is of `encoding` but damaged."""
    position, label = error.start + skip, _NAMES.get(encoding, encoding.upper())
    kind = DamagedUtf8 if encoding == "utf-8" else UserError
    at_the_end = ("unexpected end", "incomplete", "truncated")  # UTF-8, East Asian, UTF-16
    if error.end == len(error.object) and any(words in error.reason for words in at_the_end):
        return kind(
            f"{name}: this is {label} cut in the middle of a character, at byte {position:,}; "
            "take the file from its source again."
        )
    return kind(
        f"{name}: this looks like {label}, but byte {position:,} cannot be decoded; repair the "
        "file or convert it to UTF-8."
    )


def _refuse_broken_utf8(data: bytes, error: UnicodeDecodeError, name: str) -> None:
    """Raise if `data` is UTF-8 with damage; return if it is rather another encoding."""
    sound = data.decode("utf-8", "ignore")
    damaged = len(data) - len(sound.encode())
    beyond_ascii = len(sound) - (len(data) - _high_bytes(data))
    # By accident, about one of ten non-ASCII pieces of Shift_JIS or EUC-JP looks like UTF-8.
    at_the_end = error.end == len(data) and "unexpected end" in error.reason
    if beyond_ascii > (0 if at_the_end else 2 * damaged):
        raise _broken(error, "utf-8", name) from None


def _high_bytes(data: bytes) -> int:
    """How many bytes are above 127."""
    return len(data) - len(data.translate(None, _HIGH))


def _legacy(data: bytes, name: str) -> tuple[str, str]:
    """Shift_JIS, EUC-JP, Latin-1 or Windows-1252."""
    high = _high_bytes(data)
    isolated = len(_ISOLATED.findall(data))
    best: tuple[float, str, str] | None = None
    failed: tuple[float, UnicodeDecodeError, str] | None = None
    for family in _JAPANESE:
        for encoding in family:
            try:
                text = _decode(data, encoding)
            except UnicodeDecodeError as error:
                score = _japanese(data[: error.start].decode(encoding))
                if failed is None or score > failed[0]:
                    failed = score, error, family[0]
                continue
            score = _japanese(text)
            if best is None or score > best[0]:
                best = score, text, encoding
            break
    if best is not None:
        score, text, encoding = best
        if score >= 0.15 or (isolated < 0.5 * high and _common_kanji(text, encoding, score)):
            return text, encoding
    if isolated >= 0.5 * high and len(_CONTROLS.findall(data)) <= 0.01 * len(data):
        encoding = "cp1252" if re.search(rb"[\x80-\x9f]", data) else "latin-1"
        return _strict(data, encoding, name), encoding
    if failed is not None and failed[0] >= 0.15:
        raise _broken(failed[1], failed[2], name)
    raise UserError(
        f"{name}: the encoding is none that this program knows (UTF-8, UTF-16 with a byte order "
        "mark, Shift_JIS, EUC-JP, ISO-2022-JP, Latin-1, Windows-1252); convert it to UTF-8."
    )


def _common_kanji(text: str, encoding: str, score: float) -> bool:
    """Whether text without kana is Japanese all the same: a name, a title, a table.

    Only for Shift_JIS: as EUC-JP, Chinese and Korean encodings would give common kanji as well.
    """
    if encoding != "cp932" or score < 0:
        return False
    leads = "".join(char for char in text[:SAMPLE] if char > "\x7f").encode(encoding)[::2]
    return sum(0x81 <= lead <= 0x97 for lead in leads) >= 0.7 * len(leads)


def _decode(data: bytes, encoding: str) -> str:
    """Like `data.decode`, but also strict where Python's cp932 gives undefined bytes a place."""
    text = data.decode(encoding)
    if encoding == "cp932" and (found := _UNDEFINED.search(text)):
        start = len(text[: found.start()].encode(encoding))
        raise UnicodeDecodeError(encoding, data, start, start + 1, "undefined byte")
    return text


def _japanese(text: str) -> float:
    """How Japanese a text reads: the share of kana among its non-ASCII characters, less the odd.

    Japanese prose has about 0.6; the wrong one of Shift_JIS and EUC-JP gives rare kanji and
    half-width katakana, and so less than 0.
    """
    sample = [char for char in text[:SAMPLE] if char > "\x7f"]
    if not sample:
        return -1.0
    beyond = "".join(sample)
    return (len(_KANA.findall(beyond)) - 2 * len(_ODD.findall(beyond))) / len(beyond)
