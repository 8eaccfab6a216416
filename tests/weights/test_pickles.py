"""The one door for old pickles: what they hold comes out, what they want to do is not done."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.weights import pickles
from llm_from_scratch.weights.pickles import pickle_files, read_pickle, write_safetensors


def state() -> dict[str, Any]:
    torch.manual_seed(3)
    shared = torch.nn.Parameter(torch.randn(7, 4))
    whole = torch.randn(6, 5)
    return OrderedDict(
        [
            ("embedding.weight", shared),
            ("head.weight", shared),
            ("half", torch.randn(3, 2).bfloat16()),
            ("rows", whole[2:4]),
            ("turned", whole.t()),
            ("position_ids", torch.arange(9)[None]),
            ("one", torch.tensor(0.5)),
        ]
    )


@pytest.fixture(params=[True, False], ids=["zip", "old"])
def save(request: pytest.FixtureRequest) -> Callable[[Any, Path], None]:
    """`torch.save` as it is, and as it was before PyTorch 1.6."""

    def write(value: Any, path: Path) -> None:
        torch.save(value, path, _use_new_zipfile_serialization=request.param)

    return write


def equal(got: dict[str, Tensor], wanted: dict[str, Any]) -> bool:
    return got.keys() == wanted.keys() and all(
        got[name].dtype == wanted[name].dtype and torch.equal(got[name], wanted[name])
        for name in wanted
    )


def test_what_was_saved_comes_out(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    save(state(), tmp_path / "pytorch_model.bin")
    assert pickle_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    assert equal(read_pickle(tmp_path / "pytorch_model.bin"), state())
    for name in ("state_dict", "model_state_dict", "model"):
        save({"epoch": 3, "lr": 0.1, name: state()}, tmp_path / "run.ckpt")
        assert equal(read_pickle(tmp_path / "run.ckpt"), state())


def test_a_checkpoint_of_training_may_hold_other_tensors(
    save: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    save({"model": state(), "rng_state": torch.get_rng_state(), "step": 3}, tmp_path / "c.ckpt")
    assert equal(read_pickle(tmp_path / "c.ckpt"), state())


def test_into_safetensors(
    save: Callable[[Any, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(pickles, "SHARD_BYTES", 150)
    values = list(state().items())
    for number, part in enumerate((values[:2], values[2:])):
        save(dict(part), tmp_path / f"pytorch_model-{number}.bin")
    write_index(tmp_path)
    write_safetensors(pickle_files(tmp_path), tmp_path / "out")
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(written) == 5
    assert equal({n: t for path in written for n, t in load_file(path).items()}, state())


def write_index(folder: Path, **changes: str) -> None:
    """Two tensors in the first file and the rest in the second, but for what is changed."""
    table = {name: f"pytorch_model-{int(i > 1)}.bin" for i, name in enumerate(state())} | changes
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": table}), "utf-8")


@pytest.mark.parametrize("name", ["half", "ghost"])
def test_an_index_that_contradicts_its_pickles(name: str, tmp_path: Path) -> None:
    """A tensor in another file than the index says, and one that is nowhere."""
    (tmp_path / "out").mkdir()
    values = list(state().items())
    for number, part in enumerate((values[:2], values[2:])):
        torch.save(dict(part), tmp_path / f"pytorch_model-{number}.bin")
    write_index(tmp_path, **{name: "pytorch_model-0.bin"})
    with pytest.raises(UserError, match=f"says that the tensor '{name}' is in 'pytorch_model-0"):
        write_safetensors(pickle_files(tmp_path), tmp_path / "out")
    # One file alone, of several: the index is not of it.
    write_safetensors([tmp_path / "pytorch_model-0.bin"], tmp_path / "out")


def test_which_files_are_meant(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    assert pickle_files(tmp_path / "a.bin") == [tmp_path / "a.bin"]
    assert pickle_files(tmp_path) == []  # some pickle, but not the weights of a model
    index = tmp_path / "pytorch_model.bin.index.json"
    for content, words in (
        ('{"weight_map": {}}', "no 'weight_map'"),
        ('{"weight_map": {"x": "../a.bin"}}', "not a shard's name"),
        ('{"weight_map": {"x": "gone.bin"}}', "gone.bin', which is missing"),
    ):
        index.write_text(content, "utf-8")
        with pytest.raises(UserError, match=words):
            pickle_files(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert pickle_files(tmp_path) == []


# --- files that want something else --------------------------------------------------------------


class Trap:
    """Creates a file when it is unpickled by a reader that runs what it is told."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Bomb:
    """Asks for a terabyte of zeros."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (1 << 40,)


def as_zip(content: bytes, path: Path, packing: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")


def as_old(content: bytes, path: Path) -> None:
    torch.save({}, path, _use_new_zipfile_serialization=False)
    stream = io.BytesIO(path.read_bytes())
    for _ in range(3):
        pickle.load(stream)
    path.write_bytes(path.read_bytes()[: stream.tell()] + content + pickle.dumps([], protocol=2))


@pytest.mark.parametrize("write", [as_zip, as_old])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_program_is_not_run(
    write: Callable[[bytes, Path], None], protocol: int, tmp_path: Path
) -> None:
    sprung = tmp_path / "sprung"
    path = tmp_path / "pytorch_model.bin"
    for value in (Trap(sprung), {"weight": torch.zeros(2), "x": [Trap(sprung)]}, {"x": Bomb()}):
        write(pickle.dumps(value, protocol), path)
        with pytest.raises(UserError, match=r"a pickle that .*; it is not opened"):
            read_pickle(path)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))  # the trap is a trap
    assert sprung.exists()


def test_the_name_of_the_program_is_said(tmp_path: Path) -> None:
    as_zip(pickle.dumps(Trap(tmp_path / "sprung"), protocol=2), tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a pickle that names {os.mkdir.__module__}.mkdir"):
        read_pickle(tmp_path / "a.pt")


def test_what_is_no_pickle_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    for value in (3, [torch.zeros(2)], {}, {"a": 1}, {"model": {"a": 1}}, {0: torch.zeros(2)}):
        torch.save(value, path)
        with pytest.raises(UserError, match="no tensors with names"):
            read_pickle(path)
    for value in (
        torch.zeros(1).expand(1000, 1000),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
    ):
        torch.save({"weight": value}, path)
        with pytest.raises(UserError, match=r"not an ordinary tensor|is no tensor"):
            read_pickle(path)
    for content in (b"", b"\x80\x02}q\x00.", b"<html>", pickles.OLD_MAGIC[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not written by PyTorch"):
            read_pickle(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UserError):
        read_pickle(path)


def test_archives_made_to_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pytorch_model.bin"
    as_zip(bytes(1 << 20), path, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="PyTorch did not write"):
        read_pickle(path)
    as_zip(b"(" * (pickles.PICKLE_BYTES + 1), path)
    with pytest.raises(UserError, match="was not written by PyTorch"):
        read_pickle(path)
    as_old(b"(" * (pickles.PICKLE_BYTES + 1), path)
    with pytest.raises(UserError, match="truncated or damaged"):
        read_pickle(path)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(UserError, match="not written by PyTorch"):
        read_pickle(path)
    # One large tensor under many names would be written as often.
    large = torch.zeros(1000)
    torch.save({str(number): large for number in range(100)}, path)
    with pytest.raises(UserError, match="far more than it holds"):
        write_safetensors([path], tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.fixture(scope="module")
def sound() -> list[bytes]:
    """A sound file of each kind."""
    files = []
    for kind in (True, False):
        stream = io.BytesIO()
        torch.save(state(), stream, _use_new_zipfile_serialization=kind)
        files.append(stream.getvalue())
    return files


@given(st.data())
def test_broken_files_are_sentences(
    tmp_path_factory: pytest.TempPathFactory, sound: list[bytes], data: st.DataObject
) -> None:
    content = bytearray(data.draw(st.sampled_from(sound)))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "broken.bin"
    path.write_bytes(content)
    try:
        for tensor in read_pickle(path).values():
            tensor.sum()  # what is mapped can be read
    except UserError as error:
        assert str(path) in str(error)
