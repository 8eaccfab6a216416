"""Tokenizers on disk: whatever a folder has, read into a specification and a config, and written.

`tokenizer.json` says everything. Where there is none, the vocabulary lies in older files whose
names tell what they are, and the class named in `tokenizer_config.json` says what to make of them
(`classes.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import write_aside
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.text import japanese, marian
from llm_from_scratch.text.checks import (
    REMEDY,
    Config,
    Spec,
    check_config,
    check_ids,
    check_spec,
)
from llm_from_scratch.text.classes import (
    CLASSES,
    PLAIN,
    UNSPOKEN,
    as_class,
    build,
    class_for,
    class_name,
    rebuilds_the_same,
    with_defaults,
)
from llm_from_scratch.text.front import Front
from llm_from_scratch.text.pretokenize import byte_letters
from llm_from_scratch.text.sentencepiece_model import parse_sentencepiece, sentencepiece_bytes
from llm_from_scratch.text.wordpiece_spec import read_vocab_txt

SPEC = "tokenizer.json"
# SentencePiece models, by the names that the classes give them.
PIECES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model")
WORDS = "vocab.txt"
MERGES = ("vocab.json", "merges.txt")
# What of a config is said in tokenizer.json already, or was never in a file.
INTERNAL = ("added_tokens.json", "added_tokens_decoder", "token_flags", "model_type")
PLAIN_CLASS = "PreTrainedTokenizerFast"


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a tokenizer come to."""

    spec: Spec
    config: Config
    front: Front | None = None


def has_tokenizer(folder: Path | str) -> bool:
    """Whether `read_tokenizer` would find a vocabulary in `folder`."""
    folder = Path(folder)
    return _is_marian(folder) or _find(folder) is not None


def _is_marian(folder: Path) -> bool:
    return all((folder / name).is_file() for name in marian.FILES)


def _find(folder: Path, files: str | None = None) -> Path | None:
    """The file with the vocabulary of a folder: `tokenizer.json`, or of the kind `files` if any."""
    kinds = {"pieces": PIECES, "words": (WORDS,), "merges": MERGES[:1]}
    order = sorted(kinds, key=lambda kind: kind != files)
    for name in (SPEC, *(name for kind in order for name in kinds[kind])):
        if (folder / name).is_file() and (name != MERGES[0] or (folder / MERGES[1]).is_file()):
            return folder / name
    return None


def read_tokenizer(path: Path | str) -> TokenizerFiles:
    """The tokenizer of a folder, or of one file of a vocabulary (and what lies beside it).

    Raises `UserError`, which names the file or the folder, for anything that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder with a tokenizer.json.")
    try:
        if path.is_file():
            return _read_file(path, read_config(path.parent))
        return _read_folder(path, read_config(path))
    except UserError as error:
        beside = [path, *(path if path.is_dir() else path.parent).iterdir()]
        if any(str(one) in str(error) for one in beside):
            raise
        raise UserError(f"{path}: {error}") from error


def _read_folder(folder: Path, config: Config) -> TokenizerFiles:
    name = class_name(config)
    # These two are read from their own files by `transformers`, whatever else there is.
    if name == japanese.CLASS:
        return _complete(*japanese.read_japanese(folder, config))
    if _is_marian(folder) and (name == marian.CLASS or name in UNSPOKEN):
        return _complete(*marian.read_marian(folder, config))
    path = _find(folder, CLASSES[name].files if name in CLASSES else None)
    if path is not None:
        return _read_file(path, config)
    found = sorted(p.name for p in folder.iterdir() if "token" in p.name or "vocab" in p.name)
    has = f" (it has {', '.join(found)})" if found else ""
    raise UserError(
        f"{folder} has no tokenizer.json, and no SentencePiece model, vocab.txt, or vocab.json "
        f"with merges.txt{has}."
    )


def _read_file(path: Path, config: Config) -> TokenizerFiles:
    folder = path.parent
    if path.name in MERGES:
        files = _vocab_and_merges(folder / MERGES[0], folder / MERGES[1])
        return _complete(*build(class_for(config, "merges", folder), files, config))
    if path.name == WORDS:
        kind = class_for(config, "words", folder)
        return _complete(*build(kind, read_vocab_txt(path), config))
    if path.suffix in (".model", ".spm") or ".model." in path.name:
        return _read_pieces(path, config)
    spec = read_json_object(path, REMEDY)
    try:
        check_spec(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if path.name == SPEC:
        spec = as_class(spec, config)
        config = with_defaults(spec, config)
    return _complete(spec, config)


def _complete(spec: Spec, config: Config, front: Front | None = None) -> TokenizerFiles:
    return TokenizerFiles(spec, _public(config), front)


def _public(config: Config) -> Config:
    return {key: value for key, value in config.items() if key not in INTERNAL}


def _read_pieces(path: Path, config: Config) -> TokenizerFiles:
    data = sentencepiece_bytes(path)
    if data[:64].split(b"\n")[0].endswith(b" 0"):
        raise UserError(
            f"{path} is no SentencePiece model but a tiktoken rank file: read it with "
            "Tokenizer.from_tiktoken, which wants to know its pattern and special tokens."
        )
    kind = class_for(config, "pieces", path.parent)
    model = parse_sentencepiece(data, path)
    return _complete(*build(kind, model, {**model.roles(), **config}))


def read_vocab_and_merges(vocab: Path, merges: Path, config: Config | None = None) -> Spec:
    """The spec of a byte-level tokenizer in GPT-2's two files; special tokens as `config` says."""
    return build(PLAIN["merges"], _vocab_and_merges(vocab, merges), config or {})[0]


def _vocab_and_merges(vocab: Path, merges: Path) -> tuple[dict[str, int], list[str]]:
    """The content of GPT-2's two files."""
    tokens = check_ids(read_json_object(vocab, REMEDY), vocab)
    if missing := [letter for letter in byte_letters() if letter not in tokens]:
        raise UserError(
            f"{vocab} is not a byte-level vocabulary: it lacks the byte {missing[0]!r}. Convert "
            "this tokenizer to tokenizer.json first."
        )
    try:
        lines = merges.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{merges} cannot be read ({error.strerror}); {REMEDY}.") from error
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    return tokens, [line.rstrip("\r") for line in lines if line.strip()]


def read_config(folder: Path) -> Config:
    """`tokenizer_config.json` and, where it is silent, the files of older and newer layouts.

    Beside what that file may hold: "model_type" from a `config.json`, "added_tokens.json" (tokens
    and ids), and "token_flags", what is said of a token beside its text.
    """
    config: Config = {}
    if (path := folder / "config.json").is_file():
        config["model_type"] = read_json_object(path, "copy the model anew").get("model_type")
    if (path := folder / "special_tokens_map.json").is_file():
        config |= check_config(read_json_object(path, REMEDY), path)
    if (path := folder / "tokenizer_config.json").is_file():
        known = check_config(read_json_object(path, REMEDY), path)
        known.pop("model_type", None)
        flags = {**config.get("token_flags", {}), **known.get("token_flags", {})}
        config |= {key: value for key, value in known.items() if value is not None}
        config["token_flags"] = flags
    if (path := folder / "added_tokens.json").is_file():
        config["added_tokens.json"] = check_ids(read_json_object(path, REMEDY), path)
    if (path := folder / "chat_template.jinja").is_file():
        try:
            config["chat_template"] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text (byte {error.start}); {REMEDY}, or remove it."
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {REMEDY}.") from error
    elif (path := folder / "chat_template.json").is_file():
        known = check_config(read_json_object(path, REMEDY), path)
        config["chat_template"] = known.get("chat_template")
    return config


def write_tokenizer(
    folder: Path | str, spec: Spec, config: Config, front: Front | None, tokens: list[str | None]
) -> None:
    """Write what `transformers.AutoTokenizer` reads with the same ids.

    `tokenizer.json` and `tokenizer_config.json`; with a front the vocabulary files of its class.
    """
    folder = Path(folder)
    config = _public(config)
    config.setdefault("clean_up_tokenization_spaces", False)
    if front is not None:
        config["tokenizer_class"] = front.name
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in spec["added_tokens"]
        }
        # An added token is in the table above; the vocabulary has what came before it.
        own = spec["model"]["vocab"]
        count = len(own) if isinstance(own, list) else max(own.values(), default=-1) + 1
        for name, data in front.files(tokens[:count]).items():
            with write_aside(folder / name, "wb") as file:
                file.write(data)
    else:
        # This class takes tokenizer.json as it is; named ones rebuild parts of it from habit.
        if not rebuilds_the_same(spec, config):
            config["tokenizer_class"] = PLAIN_CLASS
        with write_aside(folder / SPEC) as file:
            json.dump(spec, file, ensure_ascii=False, indent=2)
    with write_aside(folder / "tokenizer_config.json") as file:
        json.dump(config, file, ensure_ascii=False, indent=2)
