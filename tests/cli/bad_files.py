"""The files that docs/en/errors.md speaks of: a sound run, and things that are broken."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llm_from_scratch.train.pretrain import pretrain
from tests.train.helpers import config, text, with_train


def prepare(folder: Path) -> None:
    """Fill `folder`. Paths are relative to it when the commands are run."""
    (folder / "corpus.txt").write_text(text(), "utf-8")
    with contextlib.chdir(folder):
        small = config(folder, out="run", data={"paths": ["corpus.txt"]})
        pretrain(with_train(small, max_steps=2), quiet=True)
    (folder / "text.txt").unlink()
    shutil.copytree(folder / "run" / "model", folder / "model")
    _texts(folder)
    _settings(folder)
    _models(folder)
    _ggufs(folder)
    _vocabularies(folder)


def _texts(folder: Path) -> None:
    japanese = "名前はまだ無い。" * 20
    (folder / "notes.txt").write_text("ordinary words\n", "utf-8")
    (folder / "short.txt").write_text("Too short.\n", "utf-8")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "empty-folder").mkdir()
    (folder / "cut.txt").write_bytes(japanese.encode()[:-1])
    (folder / "sjis.txt").write_bytes(japanese.encode("cp932") + b"\xfd\n")
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n{"text": \n', "utf-8")
    (folder / "titles.jsonl").write_text('{"title": "a row"}\n' * 3, "utf-8")
    (folder / "table.csv").write_text("id,body\n1,words\n", "utf-8")
    (folder / "labels.csv").write_text("text,label\ngood words,good\nbad words,bad\n", "utf-8")
    (folder / "twice.csv").write_text("text,text\ngood,good\n", "utf-8")
    (folder / "sources.csv").write_text("source,target\n,Rain in Osaka\n", "utf-8")
    (folder / "books.zip").write_bytes(b"PK\x03\x04 this is no archive")
    newer = io.BytesIO()
    with zipfile.ZipFile(newer, "w") as archive:
        archive.writestr("a.txt", "words")
    data = bytearray(newer.getvalue())
    data[data.index(b"PK\x01\x02") + 6] = 99  # the version that is needed to unpack it
    (folder / "newer.zip").write_bytes(data)
    (folder / "books.txt.gz").write_bytes(b"this is no archive either")
    (folder / "image.txt").write_bytes(bytes(4096))


def _settings(folder: Path) -> None:
    for name, content in {
        "broken.yaml": "train:\n  max_steps: [20\nmodel: {}\n",
        "list.yaml": "- train\n- model\n",
        "typo.yaml": "train:\n  max_step: 20\n",
        "wrong-part.yaml": "trian:\n  max_steps: 20\n",
        "wrong-type.yaml": "train:\n  max_steps: many\n",
        "flat.yaml": "train: 20\n",
        "sft.yaml": "method: sft\n",
    }.items():
        (folder / name).write_text(content, "utf-8")


def _models(folder: Path) -> None:
    def variant(name: str, change: Callable[[Path], None]) -> None:
        shutil.copytree(folder / "model", folder / name)
        change(folder / name)

    def fields(**changes: Any) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            values = json.loads((path / "config.json").read_text("utf-8"))
            (path / "config.json").write_text(json.dumps({**values, **changes}), "utf-8")

        return change

    def cut(path: Path) -> None:
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    def pickled(path: Path) -> None:
        (path / "model.safetensors").rename(path / "pytorch_model.bin")

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("sprung",)

    def trapped(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        torch.save({**tensors, "trap": Trap()}, path / "pytorch_model.bin")

    def torn(path: Path) -> None:
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
        _halve(path / "pytorch_model.bin")

    def wrong_shape(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
        save_file(tensors, path / "model.safetensors")

    def lacking(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, path / "model.safetensors")

    def mixed(path: Path) -> None:
        (path / "model.safetensors").rename(path / "model-1.safetensors")
        table = {
            "model.norm.weight": "model-1.safetensors",
            "lm_head.weight": "model-1.safetensors",
        }
        _rewrite(path / "model.safetensors.index.json", {"weight_map": table})

    variant("cut-model", cut)
    variant("pickle-model", pickled)
    variant("trap-model", trapped)
    variant("torn-model", torn)
    variant("bent-model", wrong_shape)
    variant("lacking-model", lacking)
    variant("strange-model", fields(model_type="lama", architectures=["LamaForCausalLM"]))
    variant("odd-model", fields(num_attention_heads=3))
    variant("gemma-model", fields(model_type="gemma3"))
    variant("t5-model", lambda path: _rewrite(path / "config.json", {"model_type": "t5"}))
    variant("mixed-model", mixed)
    variant("mute-model", lambda path: (path / "tokenizer.json").unlink())
    variant("bare-model", lambda path: (path / "model.safetensors").unlink())

    def written(name: str, content: bytes) -> Callable[[Path], None]:
        return lambda path: (path / name).write_bytes(content) and None

    def with_template(template: str) -> Callable[[Path], None]:
        return written("chat_template.jinja", template.encode())

    def giant_id(path: Path) -> None:
        values = json.loads((path / "tokenizer.json").read_text("utf-8"))
        values["added_tokens"][0]["id"] = 4_000_000_000
        (path / "tokenizer.json").write_text(json.dumps(values), "utf-8")

    twice = "{% set ns.x = ns.x ~ ns.x %}"
    doubling = "{% set ns = namespace(x='a') %}{% for i in range(40) %}" + twice + "{% endfor %}"
    variant("endless-model", written("generation_config.json", b'{"eos_token_id": {"a": 1}}'))
    variant("listed-model", written("generation_config.json", b"[]"))
    variant("latin-model", written("chat_template.jinja", b"caf\xe9"))
    variant("nameless-model", written("tokenizer_config.json", b'{"chat_template": [{}]}'))
    variant("deep-model", written("config.json", b"[" * 200_000))
    variant("long-model", fields(max_position_embeddings=1 << 32))
    variant("giant-model", giant_id)
    variant("doubling-model", with_template(doubling))
    variant("broken-config", lambda path: _halve(path / "config.json"))
    variant("broken-tokenizer", lambda path: _halve(path / "tokenizer.json"))
    (folder / "old.bin").write_bytes(b"\x80\x02}q\x00.")
    (folder / "unfinished").mkdir()
    shutil.copy(folder / "run" / "config.yaml", folder / "unfinished")
    shutil.copytree(folder / "run", folder / "damaged")
    _halve(folder / "damaged" / "checkpoints" / "step-2" / "model.safetensors")


def _rewrite(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), "utf-8")


def _halve(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _ggufs(folder: Path) -> None:
    def word(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    (folder / "empty.gguf").touch()
    (folder / "fake.gguf").write_bytes(b"<html>404 Not Found</html>")
    (folder / "four.gguf").write_bytes(b"GGUF")
    (folder / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\x14\x00")
    entry = word("general.architecture") + struct.pack("<I", 8) + word("mamba")
    (folder / "mamba.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)


def _vocabularies(folder: Path) -> None:
    """Tokenizers in files of their own; the two bytes are a piece that never ends."""
    japanese = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "sudachi"}
    for name, file, content, values in (
        ("torn-t5", "spiece.model", b"\x0a\x05", {"tokenizer_class": "T5Tokenizer"}),
        ("camembert", "spiece.model", b"\x0a\x00", {"tokenizer_class": "CamembertTokenizer"}),
        ("nameless-bert", "vocab.txt", b"a\nb\n", {"tokenizer_class": "BertTokenizer"}),
        ("sudachi-bert", "vocab.txt", b"[UNK]\n", japanese),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_bytes(content)
        (folder / name / "tokenizer_config.json").write_text(json.dumps(values))


def long_text() -> str:
    """More tokens than the model's context holds."""
    return text(60).strip()
