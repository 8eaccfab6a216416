"""Vocabularies of published models: the ids of `transformers` and `sentencepiece` on every text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from llm_from_scratch.text.sentencepiece import SentencePiece
from llm_from_scratch.text.sentencepiece_model import read_sentencepiece
from llm_from_scratch.text.tokenizer import Tokenizer
from tests.text.families import ODD
from tests.text.real_vocabularies import VOCABULARIES, real
from tests.text.test_tokenizer_formats import texts_under
from tests.weights.real_files import real as real_model

pytestmark = [pytest.mark.weights, pytest.mark.filterwarnings("ignore:Recommended")]
MODELS = [name for name, one in VOCABULARIES.items() if "tokenizer.model" in str(one.files)]
PIECES = [name for name, one in VOCABULARIES.items() if "spiece.model" in str(one.files)]
JSON = [name for name in VOCABULARIES if name not in (*MODELS, *PIECES)]


def texts(data_dir: Path) -> list[tuple[str, str]]:
    return [*texts_under(data_dir, 800), *((repr(text), text) for text in ODD)]


def check(ours: Tokenizer, theirs: Any, data_dir: Path) -> None:
    assert ours.vocab_size == len(theirs)
    for name, text in texts(data_dir):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, special=True) == ids, name
        if name not in map(repr, ODD):
            wanted = theirs.decode(ids, clean_up_tokenization_spaces=False)
            assert ours.unk_id in ids or ours.decode(ids) == wanted, name
    for text, pair in (("Hello world", None), ("Hello", "犬 and dog"), ("", "a")):
        wanted = theirs(text, pair)["input_ids"]
        assert ours.encode_inputs([text], None if pair is None else [pair]).ids == [wanted]


@pytest.mark.parametrize("name", JSON)
def test_ids_of_tokenizer_json(name: str, data_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = real(name)
    if name == "t5":  # cuts every text at 48 tokens, which is no matter of ids
        values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        values |= {"truncation": None, "padding": None}
        (tmp_path / "tokenizer.json").write_text(json.dumps(values), "utf-8")
        (tmp_path / "tokenizer_config.json").write_bytes(
            (folder / "tokenizer_config.json").read_bytes()
        )
        folder = tmp_path
    ours = Tokenizer.load(folder)
    check(ours, AutoTokenizer.from_pretrained(folder), data_dir)
    ours.save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ODD:
        assert saved(text, add_special_tokens=False)["input_ids"] == ours.encode(text, special=True)


@pytest.mark.parametrize("name", ["all-mpnet-base-v2", "opus-mt-en-fr"])
def test_ids_of_whole_models(name: str, data_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = real_model(name)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    check(ours, theirs, data_dir)
    if name == "opus-mt-en-fr":
        for _, text in texts(data_dir):
            wanted = theirs(text_target=text)["input_ids"]
            assert ours.target.encode_inputs([text], special=True).ids == [wanted]
        return
    for file in ("vocab.txt", "tokenizer_config.json", "config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    # From vocab.txt alone: the same but for `<unk>`, which only tokenizer.json calls special.
    check(Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path), data_dir)


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_mistrals_models(name: str, data_dir: Path) -> None:
    """As SentencePiece gives them: `transformers` joins runs of spaces by the order of ids."""
    path = real(name) / "tokenizer.model"
    ours, theirs = Tokenizer.load(path), SentencePieceProcessor(model_file=str(path))
    for file, text in texts(data_dir):
        if "<" not in file:
            assert ours.encode(text) == theirs.encode(text), file
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("name", [*MODELS, *PIECES])
def test_ids_of_sentencepiece(name: str, data_dir: Path) -> None:
    (path,) = real(name).glob("*.model")
    ours, theirs = SentencePiece(read_sentencepiece(path)), SentencePieceProcessor(str(path))
    for file, text in texts(data_dir):
        assert ours.encode_batch([text]) == [theirs.encode(text)], file
