"""The built wheel has all that is needed: installed elsewhere, it trains a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llm_from_scratch"
DOCS = "llm_from_scratch/serve/docs"  # where the server finds the pages of docs/

pytestmark = pytest.mark.full


def do(*words: str | Path, cwd: Path) -> str:
    """Run a program in a folder, away from this checkout; its standard output."""
    away = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in away}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("dist")
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    do(sys.executable, *build, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_is_pure_python_and_complete(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        about = archive.read(metadata).decode()
    sources = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    pages = {
        f"{DOCS}/{path.relative_to(ROOT / 'docs')}"
        for part in ("en", "ja", "images")
        for path in (ROOT / "docs" / part).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert f"{DOCS}/ja/index.md" in pages
    assert {name for name in names if ".dist-info/" not in name} == sources | pages
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Name: scratchlm\n" in about
    for library in ("transformers", "gguf", "tiktoken", "llama"):
        assert f"Requires-Dist: {library}" not in "\n".join(
            line for line in about.split("\n") if "extra ==" not in line
        )


def test_the_installed_wheel_trains(wheel: Path, tmp_path: Path) -> None:
    """A clean environment, the wheel and what pip finds for it under the constraints: nothing else.

    Needs the network (pip's packages); without it the test is skipped and says so.
    """
    do(sys.executable, "-m", "venv", "env", cwd=tmp_path)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    try:
        words = ("install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        do(python, "-m", "pip", *words, cwd=tmp_path)
    except AssertionError as error:
        if any(sign in str(error) for sign in ("Connection", "Temporary failure", "timed out")):
            pytest.skip(f"pip cannot reach its packages: {str(error)[-200:]}")
        raise
    site = Path(
        do(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
        .strip()
    )  # fmt: skip

    where = do(
        python, "-c", "import llm_from_scratch; print(llm_from_scratch.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(site)
    command = next(scripts.glob("scratchlm*"))
    assert do(command, "--version", cwd=tmp_path).startswith("scratchlm ")
    flags = (
        "--minutes 4 --train.max_steps 3 --tokenizer.vocab_size 300 --model.d_model 16 "
        "--model.n_layers 1 --model.n_heads 2 --data.seq_len 32 --json"
    )
    (tmp_path / "text.txt").write_text("the cat sat on the mat and saw it\n" * 200)
    summary = json.loads(
        do(command, "quickstart", "--data", "text.txt", *flags.split(), cwd=tmp_path)
    )
    assert summary["steps"] == 3
    assert summary["xz_bits_per_byte"] > 0
    words = ("runs/quickstart", "the", "--max_new_tokens", "3", "--seed", "1", "--json")
    assert json.loads(do(command, "generate", *words, cwd=tmp_path))["new_tokens"] <= 3
