"""Every encoding is told from the bytes alone, and damage is named, never papered over."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.decode_bytes import decode_text

JAPANESE = "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。"
FRENCH = "L'été dernier, à la fenêtre, nous avons goûté des crêpes et du café crème.\n"

KANA = "あいうえおかきくけこさしすせそたちつてとなにのはひふまみむもよりるれをんがでばどアイウカキ"
KANJI = "日一国会人年大十二本中長出三同時政事自行社見月分議後前民生連五発間対上部東者"


@pytest.mark.parametrize(
    ("encoding", "mark", "name"),
    [
        ("utf-8", b"", "utf-8"),
        ("utf-8", b"\xef\xbb\xbf", "utf-8"),
        ("utf-16-le", b"\xff\xfe", "utf-16-le"),
        ("utf-16-be", b"\xfe\xff", "utf-16-be"),
        ("utf-32-le", b"\xff\xfe\x00\x00", "utf-32-le"),
        ("utf-32-be", b"\x00\x00\xfe\xff", "utf-32-be"),
        ("cp932", b"", "cp932"),
        ("euc_jp", b"", "euc_jp"),
        ("iso2022_jp", b"", "iso2022_jp"),
    ],
)
def test_japanese(encoding: str, mark: bytes, name: str) -> None:
    assert decode_text(mark + JAPANESE.encode(encoding), "x") == (JAPANESE, name)


@given(
    st.text(KANA * 2 + KANJI + "、。「」 \nabc12", min_size=12),
    st.sampled_from(["cp932", "euc_jp", "iso2022_jp", "utf-8"]),
)
def test_any_japanese_text(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding), "x")[0] == text


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        (FRENCH, "latin-1", "latin-1"),
        ("naïve", "latin-1", "latin-1"),
        ("“Don’t”, she said – it costs 5 €.", "cp1252", "cp1252"),
        ("Größe: 5 µm, ±2 °C, § 7", "latin-1", "latin-1"),
        ("東京大学", "cp932", "cp932"),
        ("東京都千代田区①", "cp932", "cp932"),
        ("plain\x1b[0m ASCII with a terminal's colours", "ascii", "utf-8"),
        ("", "ascii", "utf-8"),
    ],
)
def test_other_texts(text: str, encoding: str, name: str) -> None:
    assert decode_text(text.encode(encoding), "x") == (text, name)


def test_characters_beyond_the_first_standard() -> None:
    """Circled numbers are in no EUC-JP of Python but the newest, and the same for the others."""
    text = JAPANESE + "①"
    assert decode_text(text.encode("euc_jis_2004"), "x") == (text, "euc_jis_2004")
    assert decode_text(text.encode("iso2022_jp_2004"), "x")[0] == text


@pytest.mark.parametrize("encoding", ["utf-8", "cp932", "euc_jp", "iso2022_jp", "utf-16"])
def test_a_cut_file(encoding: str) -> None:
    whole = JAPANESE.rstrip("。").encode(encoding)
    cut = {"iso2022_jp": whole[:-4], "utf-16": whole[:-1]}.get(encoding, whole[:-1])
    with pytest.raises(UserError, match=r"^a\.txt: this is .* cut in the middle .* at byte \d+"):
        decode_text(cut, "a.txt")


@pytest.mark.parametrize(
    ("encoding", "bad", "label"),
    [
        ("utf-8", b"\xff", "UTF-8"),
        ("cp932", b"\xfd\xfd\x20", "Shift_JIS"),
        ("euc_jp", b"\xa4\x20", "EUC-JP"),
        ("iso2022_jp", b"\xe9", "ISO-2022-JP"),
    ],
)
def test_damage_in_the_middle(encoding: str, bad: bytes, label: str) -> None:
    before = JAPANESE.encode(encoding)
    with pytest.raises(UserError, match=rf"looks like {label}, but byte {len(before)} cannot"):
        decode_text(before + bad + before, "a.txt")


@pytest.mark.parametrize(
    "data",
    [
        bytes(range(128, 256)) * 3,
        "Привет, это обычный русский текст.".encode("cp1251"),
        "мама".encode("cp1251"),
        "你好，世界。这是一个普通的中文句子，没有假名。".encode("gbk"),
        "你好世界".encode("gb2312"),
        "這是繁體中文的一個句子。".encode("big5"),
        "안녕하세요 세계".encode("euc_kr"),
        b"\x7fELF" + bytes(100),
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    ],
)
def test_what_is_no_text_or_unknown(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^a\.txt: "):
        decode_text(data, "a.txt")


@given(st.binary(max_size=60))
def test_never_a_replacement_character(data: bytes) -> None:
    try:
        text, encoding = decode_text(data, "x")
    except UserError:
        return
    if "\ufffd" in text:
        assert "\ufffd".encode(encoding) in data


def test_udhr(data_dir: Path) -> None:
    folder = data_dir / "udhr-encodings"
    found = {}
    for path in sorted(folder.iterdir()):
        try:
            found[path.name] = decode_text(path.read_bytes(), path.name)
        except UserError as error:
            assert path.name == "Japanese_Nihongo-JIS"
            assert "ISO-2022-JP cut in the middle of a character, at byte 9,999" in str(error)
    assert {name: encoding for name, (_, encoding) in found.items()} == {
        "English-Latin1": "utf-8",  # it is pure ASCII
        "Japanese_Nihongo-EUC": "euc_jp",
        "Japanese_Nihongo-SJIS": "cp932",
        "Japanese_Nihongo-UTF8": "utf-8",
        "udhr2_eng.txt": "utf-8",
        "udhr2_jpn.txt": "utf-8",
    }
    utf8 = found["Japanese_Nihongo-UTF8"][0]
    for name in ("Japanese_Nihongo-EUC", "Japanese_Nihongo-SJIS"):
        assert found[name][0][:400] == utf8[:400]


def test_aozora_in_every_encoding(data_dir: Path) -> None:
    """Each of the 50 raw files, and its text written in the other Japanese encodings."""
    for path in sorted((data_dir / "aozora/raw_sjis").iterdir()):
        data = path.read_bytes()
        text, encoding = decode_text(data, path.name)
        assert encoding == "cp932"
        assert text.encode("cp932") == data
        for other in ("euc_jp", "iso2022_jp", "utf-8", "utf-16"):
            try:
                written = text.encode(other)
            except UnicodeEncodeError:
                continue
            assert decode_text(written, path.name)[0] == text
