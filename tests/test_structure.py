"""The shape of the house: who imports whom, how large things are, what the public names are."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import llm_from_scratch
from llm_from_scratch.cli.main import VERBS, run

ROOT = Path(__file__).resolve().parents[1]
NAME = "llm_from_scratch"
PACKAGE = ROOT / NAME
# Each imports only from itself and from those before it.
LAYERS = (
    "core", "text", "model", "quant", "weights", "data", "generate", "retrieve", "evaluate",
    "train", "agents", "serve", "cli",
)  # fmt: skip
# These import anything before cli, and gpt the attention of transformer; only cli imports them.
TEACHING = ("transformer", "gpt")
FORBIDDEN = (
    "transformers", "trl", "peft", "accelerate", "torchao", "sentence_transformers", "gguf",
    "llama_cpp", "compressed_tensors", "bitsandbytes",
)  # fmt: skip
PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
FILE_LINES, FUNCTION_LINES = 450, 80
READ_IN_ONE_SITTING = ("model/layers.py", "model/decoder.py")  # together, in lines of 100 columns

SOURCES = sorted(PACKAGE.rglob("*.py"))


def package_of(path: Path) -> str:
    """The name that relative imports in a file start from."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1])


def imports(source: str, package: str = NAME) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import in a source, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` imports the module as well.
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def layer_of(module: str) -> str | None:
    """`llm_from_scratch.text.bpe` -> "text"; None for what is not ours or lies in no layer."""
    parts = module.split(".")
    return parts[1] if parts[0] == NAME and len(parts) > 1 else None


def wrong_directions(source: str, layer: str, package: str = NAME) -> list[str]:
    """The imports in a file of `layer` that lead the wrong way."""
    wrong = []
    for line, module in imports(source, package):
        target = layer_of(module)
        if target is None or target == layer or target not in (*LAYERS, *TEACHING):
            continue
        if target in TEACHING:
            allowed = layer == "cli" or (layer, target) == ("gpt", "transformer")
        elif layer in TEACHING:
            allowed = target != "cli"
        else:
            allowed = LAYERS.index(target) < LAYERS.index(layer)
        if not allowed:
            wrong.append(f"line {line}: {layer} imports {module}")
    return wrong


def foreign_imports(source: str, names: tuple[str, ...]) -> list[str]:
    return [f"line {n}: {module}" for n, module in imports(source) if module.split(".")[0] in names]


def pickle_openings(source: str) -> list[str]:
    """Places that may open a pickle."""
    found = foreign_imports(source, PICKLES)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        values = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if called == "torch.load" and values.get("weights_only") is not True:
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if values.get("allow_pickle") is True:
            found.append(f"line {node.lineno}: allow_pickle")
    return found


def third_party(source: str) -> set[str]:
    """The top-level names of what a source imports that is neither Python's nor ours."""
    names = {module.split(".")[0] for _, module in imports(source)}
    return names - set(sys.stdlib_module_names) - {NAME}


def at_the_top(source: str) -> str:
    """A source without the bodies of its functions and of `if TYPE_CHECKING:`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.If) and (
            not isinstance(node, ast.If) or ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            node.body = [ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(tree))


def long_functions(source: str, limit: int = FUNCTION_LINES) -> list[str]:
    return [
        f"{node.name}: {length} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > limit
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_keeps_the_rules(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    layer = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if path.parent != PACKAGE:
        assert layer in (*LAYERS, *TEACHING), f"{layer} has no place in the order of layers"
        assert wrong_directions(source, layer, package_of(path)) == []
    assert foreign_imports(source, FORBIDDEN) == []
    assert pickle_openings(source) == []
    assert source.count("\n") <= FILE_LINES
    assert long_functions(source) == []
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)
    assert ast.get_docstring(ast.parse(source)) or path.name in ("__init__.py", "__main__.py")


def test_every_dependency_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def plain(requirement: str) -> str:
        return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")

    base = {plain(text) for text in project["dependencies"]}
    extras = {plain(t) for part in project["optional-dependencies"].values() for t in part}
    server = {plain(text) for text in project["optional-dependencies"]["serve"]}
    owners = importlib.metadata.packages_distributions()
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        # Nobody imports the server before `scratchlm serve` has seen that its extra is there.
        at_once = base | server if path.is_relative_to(PACKAGE / "serve") else base
        top = at_the_top(source)
        for text, declared in ((source, base | extras), (top, at_once)):
            for name in third_party(text):
                assert {plain(owner) for owner in owners.get(name, [name])} & declared, (
                    f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not name"
                )
        if not path.is_relative_to(PACKAGE / "serve"):
            assert f"{NAME}.serve" not in top, f"{path} imports the server at once"


def test_the_decoder_is_read_in_one_sitting() -> None:
    lines = [
        line
        for name in READ_IN_ONE_SITTING
        for line in (PACKAGE / name).read_text(encoding="utf-8").split("\n")
    ]
    assert len(lines) <= 500
    assert max(map(len, lines)) <= 100


def test_the_teaching_models_stay_short() -> None:
    for name in ("gpt/model.py", "transformer/transformer.py"):
        assert (PACKAGE / name).read_text(encoding="utf-8").count("\n") <= 300


def test_the_checks_can_fail() -> None:
    assert wrong_directions("import llm_from_scratch.cli.main", "core")
    assert wrong_directions("def f():\n    from llm_from_scratch.train import loop\n", "model")
    assert wrong_directions("from llm_from_scratch import gpt", "train")
    assert wrong_directions("from llm_from_scratch import cli", "gpt")
    assert wrong_directions("from ..train import loop", "text", f"{NAME}.text")
    assert wrong_directions("from .. import cli", "text", f"{NAME}.text")
    assert wrong_directions("importlib.import_module('llm_from_scratch.serve')", "data")
    assert not wrong_directions("from llm_from_scratch.core import errors", "text")
    assert not wrong_directions("from . import bpe\nfrom .bpe import x", "text", f"{NAME}.text")
    assert wrong_directions("from llm_from_scratch import gpt", "transformer")
    assert not wrong_directions("from llm_from_scratch import gpt", "cli")
    assert not wrong_directions("from llm_from_scratch.train import loop", "gpt")
    assert foreign_imports("def f():\n    import transformers.models", FORBIDDEN)
    assert foreign_imports("from gguf import GGUFReader", FORBIDDEN)
    assert not foreign_imports("from llm_from_scratch.weights import gguf", FORBIDDEN)
    assert pickle_openings("import pickle")
    assert pickle_openings("torch.load(path)")
    assert pickle_openings("torch.load(path, weights_only=False)")
    assert pickle_openings("np.load(path, allow_pickle=True)")
    assert not pickle_openings("torch.load(path, weights_only=True)")
    assert third_party("import os, yaml\nfrom llm_from_scratch import core") == {"yaml"}
    assert third_party(at_the_top("import yaml\ndef f():\n    import numpy\n")) == {"yaml"}
    assert long_functions("def f():\n    x = 1\n    return x\n", limit=2)


# --- what the user sees --------------------------------------------------------------------------


def test_the_public_names() -> None:
    names = {
        "__version__", "load", "save", "generate", "quantize", "pretrain", "finetune",
        "PretrainConfig", "UserError", "RunError",
    }  # fmt: skip
    assert set(llm_from_scratch.__all__) == names
    assert names <= set(dir(llm_from_scratch))
    assert all(getattr(llm_from_scratch, name) is not None for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llm_from_scratch.nothing  # noqa: B018


@pytest.mark.parametrize(
    "module", [NAME, "llm_from_scratch.cli.main", "llm_from_scratch.train.settings"]
)
def test_import_is_quick(module: str) -> None:
    """Neither the package nor the command's head may wait for PyTorch."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_file_and_its_examples(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"{NAME}.cli.{verb}")
    assert callable(module.add_parser)
    assert callable(module.run)
    with pytest.raises(SystemExit) as end:
        run([verb, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "examples:" in said
    assert f"scratchlm {verb}" in said.partition("examples:")[2]


def test_help_lists_every_verb_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for words in ([], ["--help"], ["help"], ["-h"]):
        assert run(words) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    listed = re.findall(r"^  (\w+)  +\S", said[0], re.MULTILINE)
    assert listed == list(VERBS)
    files = {
        path.stem
        for path in (PACKAGE / "cli").glob("*.py")
        if "\ndef add_parser(" in path.read_text(encoding="utf-8")
    }
    assert files == set(VERBS)
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"scratchlm {llm_from_scratch.__version__}\n"


def test_every_page_has_its_twin() -> None:
    english, japanese = (
        {path.relative_to(folder) for path in folder.rglob("*.md")}
        for folder in (ROOT / "docs" / "en", ROOT / "docs" / "ja")
    )
    assert english == japanese
    assert english
    assert (ROOT / "README.md").is_file() == (ROOT / "README.ja.md").is_file()
