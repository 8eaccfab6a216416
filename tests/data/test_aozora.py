"""Aozora Bunko's files become the words of the work and nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from llm_from_scratch.data.aozora import clean_aozora, gaiji, is_aozora
from llm_from_scratch.data.decode_bytes import decode_text

RULE = "-" * 55
FILE = f"""題名
著者

{RULE}
【テキスト中に現れる記号について】

《》：ルビ
（例）吾輩《わがはい》
［＃］：入力者注
{RULE}

［＃３字下げ］一［＃「一」は中見出し］

　｜吾輩《わがはい》は※［＃「けものへん＋咼」、第3水準1-87-77］である。ます／＼、いろ／″＼。
　※［＃始め二重括弧、1-1-52］引用※［＃終わり二重括弧、1-1-53］と※［＃「謎」、13-2］。@
［＃改ページ］



底本は後で出る。
　※［＃「姉」の正字、「女＋※［＃第3水準1-85-57］のつくり」、256-1］さん



底本：「全集」出版社
入力：誰か
青空文庫作成ファイル：
""".replace("@", "　")  # a blank at the end of a line
WORK = """一

　吾輩は猧である。ます〳〵、いろ〴〵。
　《引用》と〓。

底本は後で出る。
　〓さん
"""


def test_a_file() -> None:
    assert is_aozora(FILE)
    assert clean_aozora(FILE) == WORK
    assert not is_aozora(WORK)


def test_a_file_without_explanation() -> None:
    text = "題名\n著者\n\n　本文《ほんぶん》です。\n\n\n底本：「本」社\n青空文庫作成ファイル：\n"
    assert is_aozora(text)
    assert clean_aozora(text) == "　本文です。\n"


def test_a_file_whose_head_is_gone_keeps_its_first_paragraph() -> None:
    text = "　最初《さいしょ》の段落。\n\n　次の段落。\n\n底本：「本」社\n青空文庫作成ファイル：\n"
    assert clean_aozora(text) == "　最初の段落。\n\n　次の段落。\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ただの文章です。\n",
        "本の《題》を書く。\n",
        "def f(): ...\n",
        "底本：と書いてあるだけ。\n",
    ],
)
def test_other_texts_are_left_alone(text: str) -> None:
    assert not is_aozora(text)


@pytest.mark.parametrize(
    ("note", "character"),
    [
        ("「靜のへん＋定」、第4水準2-91-94", "靛"),
        ("「女＋尾」、第3水準1-15-81", "娓"),
        ("「土へん＋可」、第3水準1-15-40、16-6", "坷"),
        ("「魚＋條」、U+9C37、139-16", "\u9c37"),
        ("「土へん＋己」、U+2834F、139-16", "\U0002834f"),
        ("二の字点、1-2-22", "\u303b"),
        ("半濁点付き片仮名カ、1-5-87", "\u30ab\u309a"),  # two characters make this one
        ("「口＋厄」、497-上-7", None),
        ("小書き平仮名ん、152-9", None),
        ("「蚌」の「虫」に代えて「目」、54-3", None),
        ("2-94-87", None),  # an empty place of the table
        ("1-99-1", None),
        ("U+D800", None),
    ],
)
def test_gaiji(note: str, character: str | None) -> None:
    assert gaiji(note) == character


# Notes with a gaiji inside of a gaiji's description: the reference cleaning stopped at the first
# ］ and kept the rest of the note in the text. Ours gives one 〓 for each.
NESTED = {"2078_ruby_15898": 1, "687_ruby_15355": 7}


def test_equal_to_the_reference_cleaning(data_dir: Path) -> None:
    with gzip.open(data_dir / "aozora/aozora_clean.jsonl.gz", "rt", "utf-8", newline="\n") as file:
        reference = {work["id"]: work["text"] for work in map(json.loads, file)}
    paths = sorted((data_dir / "aozora/raw_sjis").glob("*.txt"))
    assert len(paths) == 50
    for path in paths:
        text = decode_text(path.read_bytes(), path.name)[0].replace("\r\n", "\n")
        assert is_aozora(text)
        ours, theirs = clean_aozora(text), reference[path.stem]
        if path.stem not in NESTED:
            assert ours == theirs, path.name
            continue
        different = [
            (mine, other)
            for mine, other in zip(ours.split("\n"), theirs.split("\n"), strict=True)
            if mine != other
        ]
        assert sum(mine.count("〓") for mine, _ in different) == NESTED[path.stem]
        assert all("のつくり」" in other for _, other in different)
        assert "］" not in ours
