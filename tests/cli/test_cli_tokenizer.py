"""`scratchlm tokenizer train` and `show`, as typed."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.color import ColorSystem
from rich.style import Style

from llm_from_scratch.cli.main import run
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.chat_template import CHATML
from llm_from_scratch.text.show import painted
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer

TEXT = "The cat sat on the mat. The cats sat.\n吾輩は猫である。\n" * 20


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, "utf-8")
    return path


def train(corpus: Path, *flags: str) -> Tokenizer:
    out = corpus.parent / "out"
    words = ["tokenizer", "train", "--data", str(corpus), "--out", str(out), *flags]
    assert run(words) == 0
    return Tokenizer.load(out)


def test_train_bpe(corpus: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = train(corpus, "--vocab-size", "280", "--language", "ja")
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("bpe", 280, 0)
    said = capsys.readouterr()
    assert said.out == ""
    assert "280 entries" in said.err
    assert f"scratchlm tokenizer show {corpus.parent / 'out'}" in said.err


def test_a_small_text_says_that_it_gave_less(corpus: Path, capsys: pytest.CaptureFixture[str]):
    assert train(corpus).vocab_size < 8192
    assert "Fewer than the 8,192 asked for" in capsys.readouterr().err


def test_train_characters(corpus: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--kind", "char", "--special", "--no-unknown", "--json"]
    tokenizer = train(corpus, *flags)
    assert tokenizer.kind == "char"
    assert tokenizer.vocab_size == len(set(TEXT))
    result = json.loads(capsys.readouterr().out)
    assert result["vocab_size"] == tokenizer.vocab_size
    assert result["characters"] == len(TEXT)


def test_train_unigram(corpus: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = train(corpus, "--kind", "unigram", "--vocab_size", "285", "--language", "ja")
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("unigram", 285, 0)
    assert tokenizer.decode(tokenizer.encode(" 犬 <|unk|>\n")) == " 犬 <|unk|>\n"
    assert "285 entries" in capsys.readouterr().err
    flags = ["--no_byte_fallback", "--character_coverage", "0.8", "--vocab_size", "20"]
    tokenizer = train(corpus, "--kind", "unigram", *flags)
    assert tokenizer.unk_id in tokenizer.encode("犬")


def test_train_wordpiece(corpus: Path):
    tokenizer = train(corpus, "--kind", "wordpiece", "--vocab_size", "32")
    assert (tokenizer.kind, tokenizer.vocab_size) == ("wordpiece", 32)
    assert list(tokenizer.special_tokens) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.decode(tokenizer.encode("The cat sat.")) == "the cat sat."
    tokenizer = train(corpus, "--kind", "wordpiece", "--keep_case", "--special", "<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("The cat sat.")) == "The cat sat."
    assert tokenizer.eos_id == 0


def test_train_with_special_tokens(corpus: Path):
    flags = ["--special", "<s>", "</s>", "<pad>", "--vocab_size", "270", "--min_count", "3"]
    tokenizer = train(corpus, *flags)
    assert tokenizer.special_tokens == {"<s>": 0, "</s>": 1, "<pad>": 2}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)


def test_what_is_lost_or_replaced_is_said(corpus: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--kind", "char", "--special", "--vocab_size", "9"]
    tokenizer = train(corpus, *flags)
    lost = len(set(TEXT)) - 8
    assert tokenizer.vocab_size == 9 and tokenizer.unk_id is not None
    said = capsys.readouterr().err
    assert f"{lost} different characters of the text have no entry and become <|unk|>" in said
    assert "Saved in" in said and "was replaced" not in said
    train(corpus, "--kind", "char")
    said = capsys.readouterr().err
    assert "have no entry" not in said and "The tokenizer there was replaced:" in said
    train(corpus, *flags, "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["characters_without_entry"], result["replaced"]) == (lost, True)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_in_a_pipe_progress_ends_at_the_total(
    kind: str, corpus: Path, capsys: pytest.CaptureFixture[str]
):
    train(corpus, "--kind", kind, "--vocab_size", "285")
    said = capsys.readouterr().err
    words = f"counting words: {len(TEXT):,} of {len(TEXT):,} characters\n"
    assert said.count(words) == 1
    what = "pieces" if kind == "unigram" else "learning merges"
    (last,) = re.findall(rf"{what}: ([\d,]+) of ([\d,]+) \w+\n", said)
    assert last[0] == last[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep_case"], "--keep_case is for --kind wordpiece, not bpe"),
        (["--no_unknown"], "--no_unknown is for --kind char, not bpe"),
        (["--kind", "char", "--character_coverage", "1"], "unigram or wordpiece, not char"),
        (["--kind", "wordpiece", "--no_byte_fallback"], "--kind unigram, not wordpiece"),
        (["--min_count", "0"], "min_count is 0"),
    ],
)
def test_flags_that_would_do_nothing(flags: list[str], message: str, corpus: Path):
    with pytest.raises(UserError, match=message):
        train(corpus, *flags)


def test_neighbours_differ_in_every_terminal():
    tokens = [(text, None) for text in ("a", "b", "c", "d", "e")]
    for system in ("standard", "256", "truecolor", "windows"):
        text = painted(tokens, system)
        shown = [Style.parse(str(span.style)).bgcolor for span in text.spans]
        able = ColorSystem[system.upper().replace("256", "EIGHT_BIT")]
        kinds = [colour.downgrade(able) for colour in shown if colour]
        assert len(set(kinds)) == 4 and kinds[0] == kinds[4]
    assert painted(tokens, None).plain == "[a][b][c][d][e]"


def test_show(corpus: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = train(corpus, "--vocab_size", "280")
    folder = str(corpus.parent / "out")
    capsys.readouterr()
    assert run(["tokenizer", "show", folder, "the cat\n猫<|endoftext|>", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [token["id"] for token in shown["tokens"]] == tokenizer.encode(
        "the cat\n猫<|endoftext|>"
    )
    assert shown["bytes"] == 24

    flags = ["--with_special", "--json"]
    assert run(["tokenizer", "show", folder, "<|endoftext|>", *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tokens"] == [{"id": 0, "text": "<|endoftext|>"}]

    assert run(["tokenizer", "show", folder, "q z\n"]) == 0
    said = capsys.readouterr().out
    assert f"[q]{tokenizer.encode('q')[0]} " in said
    assert "4 tokens, 4 characters, 4 bytes: 1.00 bytes per token." in said


def test_show_reads_standard_input_and_run_folders(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    tokenizer = train(corpus, "--vocab_size", "280")
    tokenizer.save(corpus.parent / "run" / "model")
    capsys.readouterr()
    for place in ("run", "run/model", "run/model/tokenizer.json"):
        monkeypatch.setattr("sys.stdin", io.StringIO("sat"))
        assert run(["tokenizer", "show", str(corpus.parent / place), "-", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["characters"] == 3


def stdin_of(data: bytes, encoding: str = "utf-8") -> io.TextIOWrapper:
    """Standard input as Python opens it, under a locale's encoding."""
    return io.TextIOWrapper(io.BytesIO(data), encoding=encoding, errors="surrogateescape")


def test_standard_input_is_utf8_whatever_the_locale(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    train(corpus, "--vocab_size", "280")
    words = ["tokenizer", "show", str(corpus.parent / "out"), "-", "--json"]
    capsys.readouterr()
    for encoding in ("utf-8", "ascii", "cp1252"):
        monkeypatch.setattr("sys.stdin", stdin_of("猫 sat\r\n".encode(), encoding))
        assert run(words) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["characters"], shown["bytes"]) == (6, 8)
        monkeypatch.setattr("sys.stdin", stdin_of(b"a line\n\xff\xfe", encoding))
        with pytest.raises(UserError, match="Standard input is not UTF-8 text; convert it first"):
            run(words)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="no text to show"):
        run(words)


def test_a_text_that_is_not_utf8(corpus: Path, capsys: pytest.CaptureFixture[str]):
    train(corpus, "--vocab_size", "280")
    folder = str(corpus.parent / "out")
    capsys.readouterr()
    assert run(["tokenizer", "show", folder, "a\udcff"]) == 0  # as Python has such arguments
    assert "2 characters" in capsys.readouterr().out


def test_broken_rows_and_other_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"body": "the cat sat " * 20}, {"body": 7}]
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    with pytest.raises(UserError, match="have no text 'text' but body"):
        train(corpus)
    assert train(corpus, "--data.text_field", "body", "--vocab_size", "270").vocab_size <= 270
    assert "1 broken and left out" in capsys.readouterr().err
    flags = ["--data.text-field", "body", "--data.on_bad", "stop"]
    with pytest.raises(UserError, match=r"rows\.jsonl:2: 'body' is not a text"):
        train(corpus, *flags)
    with pytest.raises(UserError, match=r"no flag --on_bad\. Did you mean '--data\.on_bad'"):
        train(corpus, "--on_bad", "stop")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokenizer"], "Missing: train|show"),
        (["tokenizer", "train", "--data", "x"], "Missing: --out"),
        (["tokenizer", "train", "--data", "nowhere", "--out", "o"], "nowhere does not exist"),
        (
            ["tokenizer", "train", "--data", ".", "--out", "o", "--kind", "word"],
            "it must be bpe, unigram, wordpiece or char",
        ),
        (["tokenizer", "show", "nowhere", "text"], "no model 'nowhere'"),
    ],
)
def test_asked_wrongly(words, message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        run(words)
    assert message in str(error.value)
    assert not (tmp_path / "o").exists()


def test_nothing_to_show(corpus: Path):
    train(corpus)
    with pytest.raises(UserError, match="no text to show"):
        run(["tokenizer", "show", str(corpus.parent / "out"), ""])


def test_a_conversation_shows_what_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(
        ["hello world " * 9], vocab_size=280, special=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save(tmp_path / "t")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    assert run(["tokenizer", "show", str(tmp_path / "t"), "--chat", str(file)]) == 0
    assert "[[world<|im_end|>" in capsys.readouterr().out
    assert run(["tokenizer", "show", str(tmp_path / "t"), "--chat", str(file), "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    learned = "".join(t["text"] for t in tokens if t["loss"])
    assert learned.startswith("world<|im_end|>")
    file.write_bytes(b"[" * 200_000)
    with pytest.raises(UserError, match="nested too deeply"):
        run(["tokenizer", "show", str(tmp_path / "t"), "--chat", str(file)])
    file.write_text('"text"')
    with pytest.raises(UserError, match="must hold a list"):
        run(["tokenizer", "show", str(tmp_path / "t"), "--chat", str(file)])
