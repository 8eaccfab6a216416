"""Every family's tokenizer from its own vocabulary files: the ids of `transformers`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.classes import CLASSES
from llm_from_scratch.text.tokenizer import Tokenizer
from tests.text.families import BERT_TOKENS, KINDS, ODD, TEXT, Kind, words
from tests.text.test_tokenizer_formats import texts_under

# `transformers` recommends a normaliser for Marian that nobody asks for.
pytestmark = pytest.mark.filterwarnings("ignore:Recommended")
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
Made = Callable[[str], tuple[Path, Tokenizer, Any]]


@pytest.fixture(scope="session")
def corpus(request: pytest.FixtureRequest) -> list[str]:
    """Something to train on: the real texts, or without them the project's own pages."""
    try:
        data_dir = request.getfixturevalue("data_dir")
    except pytest.skip.Exception:
        pages = sorted((Path(__file__).resolve().parents[2] / "docs").glob("*/*.md"))
        return [TEXT, *(page.read_text(encoding="utf-8")[:1500] for page in pages)]
    return [TEXT, *(text for _, text in list(texts_under(data_dir, 800))[::6])]


@pytest.fixture(scope="session")
def made(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder of a kind, its tokenizer read by us and by `transformers`."""

    @cache
    def make(name: str) -> tuple[Path, Tokenizer, Any]:
        from transformers import AutoTokenizer

        folder = KINDS[name].make(tmp_path_factory.mktemp(name) / name, corpus)
        return folder, Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)

    return make


def check_ids(ours: Tokenizer, theirs: Any, texts: Iterable[tuple[str, str]]) -> None:
    for name, text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, special=True) == ids, name


def odd() -> list[tuple[str, str]]:
    return [(repr(text), text) for text in [*ODD, TEXT]]


@pytest.mark.parametrize("name", KINDS)
def test_ids_on_odd_texts(name: str, made: Made) -> None:
    _, ours, theirs = made(name)
    assert ours.vocab_size == len(theirs)
    assert [getattr(ours, f"{role}_id") for role in ROLES] == [
        getattr(theirs, f"{role}_token_id") for role in ROLES
    ]
    check_ids(ours, theirs, odd())
    plain = [text for text in ODD if "<" not in text and "[" not in text]
    assert ours.encode_batch(plain) == [ours.encode(text, special=True) for text in plain]


@pytest.mark.parametrize("name", KINDS)
def test_ids_on_every_text(name: str, made: Made, data_dir: Path) -> None:
    _, ours, theirs = made(name)
    check_ids(ours, theirs, texts_under(data_dir, 800))


# One kind for every way of cutting text; these 90 million characters take minutes for each.
WHOLE = ["qwen2", "roberta", "bert-cased", "llama", "gemma", "t5"]
WHOLE += ["marian", "japanese", "japanese-characters", "japanese-pieces"]


@pytest.mark.full
@pytest.mark.parametrize("name", WHOLE)
def test_ids_on_every_whole_text(name: str, made: Made, data_dir: Path) -> None:
    _, ours, theirs = made(name)
    texts = texts_under(data_dir, None)
    if ours.front is not None:  # theirs runs in Python, and MeCab breaks down on long texts
        texts = ((file, part) for file, text in texts for part in in_parts(text))
    check_ids(ours, theirs, texts)


def in_parts(text: str, size: int = 50_000) -> Iterable[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("name", KINDS)
def test_saved_and_read_again_by_both(name: str, made: Made, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, ours, theirs = made(name)
    ours.save(tmp_path)
    if (folder / "config.json").is_file():
        shutil.copy(folder / "config.json", tmp_path)
    again, theirs_again = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    check_ids(again, theirs, odd())
    check_ids(ours, theirs_again, odd())
    assert again.fingerprint == ours.fingerprint
    for role in ROLES:
        assert getattr(theirs_again, f"{role}_token_id") == getattr(ours, f"{role}_id")
    files = {path.name for path in tmp_path.iterdir()} - {"config.json", "tokenizer_config.json"}
    expected = {"tokenizer.json"}
    if ours.front is not None:
        expected = {path.name for path in folder.iterdir()} & {
            "vocab.txt", "spiece.model", "source.spm", "target.spm", "vocab.json",
        }  # fmt: skip
    assert files == expected


@pytest.mark.parametrize("name", [name for name in KINDS if name != "gpt2"])
def test_inputs(name: str, made: Made) -> None:
    """Padded batches of texts and pairs, cut to a length, with the masks and segments."""
    _, ours, theirs = made(name)
    texts = ["The cat", "吾輩は猫である。名前はまだ無い。", "a", "", "it sat on the mat on the mat"]
    pairs = ["", "It's a dog.", "猫" * 30, "def f(x):", "bark"]
    for second in (None, pairs):
        for length in (None, 12, 13, 20):
            cut = {} if length is None else {"truncation": True, "max_length": length}
            wanted = theirs(texts, second, padding=True, return_token_type_ids=True, **cut)
            got = ours.encode_inputs(texts, second, max_length=length)
            assert got.ids == wanted["input_ids"], (second, length)
            assert got.mask == wanted["attention_mask"]
            if ours.cls_id is not None:  # of the others no model has segments
                assert got.segments == wanted["token_type_ids"]


@pytest.mark.parametrize("name", KINDS)
def test_decoding(name: str, made: Made) -> None:
    _, ours, theirs = made(name)
    for text in ("The cat sat on the mat", "吾輩は猫である。", "def f(x): return 1"):
        ids = ours.encode(text)
        if ours.unk_id in ids:
            continue
        wanted = theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == wanted
        assert ours.decode(ids, skip_special=True) == wanted


FORBIDDEN = [
    "</s>",
    "<s>",
    "<pad>",
    "<mask>",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[PAD]",
    "<bos>",
    "<eos>",
]
FORBIDDEN += ["<extra_id_0>", "<|endoftext|>", "<|im_start|>", "<start_of_turn>", " ", "a", "猫"]


@settings(max_examples=15)
@given(st.lists(st.sampled_from(FORBIDDEN), max_size=6).map("".join))
@pytest.mark.parametrize("name", KINDS)
def test_a_users_text_never_becomes_a_special_token(name: str, made: Made, text: str) -> None:
    _, ours, _ = made(name)
    special = set(ours.special_tokens.values()) - {ours.unk_id}
    assert special.isdisjoint(ours.encode(text))
    (row,) = ours.encode_inputs([text]).ids
    assert sum(i in special for i in row) <= 2  # those around it


# ------------------------------------------------------------------------- what makes a difference


def test_the_other_language_of_a_translator(made: Made) -> None:
    _, ours, theirs = made("marian")
    for text in [*ODD, TEXT]:
        wanted = theirs(text_target=text)["input_ids"]
        assert ours.target.encode_inputs([text], special=True).ids == [wanted]
    assert ours.target.target.encode(TEXT) == ours.encode(TEXT)
    assert ours.target.encode(TEXT) != ours.encode(TEXT)
    _, other, _ = made("t5")
    assert other.target is other


def test_two_tables_of_a_translator(made: Made, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, _, _ = made("marian")
    config = {"tokenizer_class": "MarianTokenizer", "separate_vocabs": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("source.spm", "target.spm", "vocab.json"):
        shutil.copy(folder / name, tmp_path)
    table = json.loads((folder / "vocab.json").read_text("utf-8"))
    table = {token: (number + 7) % len(table) for token, number in table.items()}
    (tmp_path / "target_vocab.json").write_text(json.dumps(table), "utf-8")
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The cat sat", "吾輩は猫である。"):
        assert ours.encode(text) == theirs(text)["input_ids"][:-1]
        assert ours.target.encode(text) == theirs(text_target=text)["input_ids"][:-1]
    ours.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").target.encode("猫") == ours.target.encode("猫")


def test_tokens_added_to_a_japanese_bert(made: Made, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, _, _ = made("japanese")
    ours = Tokenizer.load(folder)
    assert ours.add_tokens(["吾輩は"]) + ours.add_tokens(["<new>"], special=True) == 2
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.vocab_size == ours.vocab_size == len(theirs)
    check_ids(again, theirs, [*odd(), ("new", "吾輩は<new>猫である。<new>")])
    assert again.special_tokens["<new>"] not in again.encode("吾輩は<new>猫")


def test_llamas_tokenizer_json_is_read_as_the_class_does(made: Made, tmp_path: Path) -> None:
    """Files of that family put a space before every text; `transformers` 5 passes over that."""
    from transformers import AutoTokenizer

    _, ours, _ = made("llama")
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    plain = {**ours.spec, "normalizer": {"type": "Sequence", "normalizers": steps}}
    plain["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain), "utf-8")
    for name, model_type in (
        ("LlamaTokenizer", "llama"), ("LlamaTokenizerFast", None), ("LlamaTokenizer", "mistral"),
        ("PreTrainedTokenizerFast", "llama"),
    ):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        (tmp_path / "config.json").unlink(missing_ok=True)
        if model_type:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        read = Tokenizer.load(tmp_path)
        check_ids(read, AutoTokenizer.from_pretrained(tmp_path), odd())
        as_written = Tokenizer.from_spec(plain).encode(" lead")
        assert (read.encode(" lead") == as_written) == (model_type == "mistral" or "Pre" in name)


def test_gpt2s_tokenizer_json_is_read_as_it_is(made: Made, tmp_path: Path) -> None:
    """SmolLM2's cuts numbers into digits; the class of `transformers` 5 passes over that."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    _, ours, _ = made("gpt2")
    digits = {"type": "Digits", "individual_digits": True}
    steps = {"type": "Sequence", "pretokenizers": [digits, ours.spec["pre_tokenizer"]]}
    vocab = {**ours.spec["model"]["vocab"], "20": ours.vocab_size}
    model = {**ours.spec["model"], "vocab": vocab, "merges": [["2", "0"]]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**ours.spec, "pre_tokenizer": steps, "model": model}), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    read, as_written = Tokenizer.load(tmp_path), PreTrainedTokenizerFast(tokenizer_file=str(path))
    check_ids(read, as_written, odd())
    assert vocab["20"] not in read.encode("2023")
    assert vocab["20"] in AutoTokenizer.from_pretrained(tmp_path)("2023")["input_ids"]


def test_t5s_tokenizer_json_is_read_as_the_class_does(made: Made, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _, ours, _ = made("t5")
    spaces = ours.spec["decoder"]
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({**ours.spec, "pre_tokenizer": spaces}), "utf-8"
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5TokenizerFast"}')
    check_ids(Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path), odd())


def test_options_of_a_class_are_followed(tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"do_lower_case": False}, {"strip_accents": False})):
        config = {"tokenizer_class": "BertTokenizer", **options}
        folder = Kind(words(BERT_TOKENS), config).make(tmp_path / str(number), [TEXT, "café É"] * 5)
        normalizer = Tokenizer.load(folder).spec["normalizer"]
        assert normalizer["lowercase"] is options.get("do_lower_case", True)
        assert normalizer["strip_accents"] is options.get("strip_accents")


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("CamembertTokenizer", "spiece.model", "how the class 'CamembertTokenizer' reads"),
        ("AlbertTokenizerFast", "spiece.model", "known are GPT2Tokenizer, "),
        ("SplinterTokenizer", "vocab.txt", "Take a version of the model with a tokenizer.json"),
    ],
)
def test_other_classes_are_refused(
    name: str, files: str, message: str, made: Made, tmp_path: Path
) -> None:
    """Their ids would be wrong, and nobody would see it."""
    folder, _, _ = made("t5" if files.endswith("model") else "bert")
    shutil.copy(folder / files, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_every_class_is_tested() -> None:
    named = {kind.config.get("tokenizer_class") for kind in KINDS.values()}
    assert set(CLASSES) - named == {"BartTokenizer"}  # "bart" has it by its model_type
