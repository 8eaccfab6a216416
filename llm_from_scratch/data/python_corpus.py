"""Corpus `python`: the text that every CPython carries, so that training needs no download.

The sources of the standard library and the language reference inside of `pydoc_data.topics` (the
texts themselves, not the module that holds them): about 9 MB of English and code. What it is
exactly depends on the Python version; for one installation it is always the same, in the same
order.

Whole packages are held out for validation. They were chosen by name, before any model was
trained: packages that programmers know, of different subjects, together 5 to 6 % of the text.
"""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.near_duplicates import Dropped, drop_near_duplicates
from llm_from_scratch.data.read import Document

HELD_OUT = ("http", "json", "logging", "tomllib", "wsgiref")

# Tables instead of text (encodings), tests (they quote the modules they test), and what is
# installed beside the library; `pydoc_data` comes in as its topics.
LEFT_OUT = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "idlelib",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
MACHINE_MADE = "_sysconfigdata"  # files with this beginning describe the machine, not Python

LEAST = 2_000_000  # characters: a library that gives less was installed without its sources


def python_corpus(dropped: list[Dropped] | None = None) -> tuple[list[Document], list[Document]]:
    """(training documents, held-out documents) of the running Python.

    Near-duplicates are dropped within each of the two, and from the training documents what is
    like a held-out one; the list `dropped`, if given, is told of them. Raises `UserError` if this
    Python has no sources on the disk.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    documents = list(library_sources(folder)) if folder.is_dir() else []
    held_out = [document for document in documents if package_of(document) in HELD_OUT]
    train = [document for document in documents if package_of(document) not in HELD_OUT]
    if sum(len(document.text) for document in train) < LEAST or not held_out:
        raise UserError(
            f"This Python has no sources of its standard library in {folder} (a zipped or minimal "
            "installation), so there is no default text: give your own with --data, or use a "
            "complete Python from python.org or your system."
        )
    train += topics()
    held_out, twins = drop_near_duplicates(held_out)
    train, others = drop_near_duplicates(train, against=held_out)
    if dropped is not None:
        dropped += twins + others
    return train, held_out


def package_of(document: Document) -> str:
    """`json` for `python/json/decoder.py`, `ast.py` for `python/ast.py`."""
    return document.source.split("/")[1]


def library_sources(folder: Path) -> Iterator[Document]:
    """The library's .py files, without `LEFT_OUT`, sorted by path within each folder."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        for name in sorted(names):
            if not name.endswith(".py") or name.startswith(MACHINE_MADE):
                continue
            path = Path(place) / name
            try:
                with tokenize.open(path) as file:  # knows `coding:` lines and all line ends
                    text = file.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue  # not a source that this Python itself could read
            if text.strip():
                yield Document(text, f"python/{path.relative_to(folder).as_posix()}")


def topics() -> list[Document]:
    """The language reference as `help()` shows it, one document per topic."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:  # some systems package it apart
        return []
    return [Document(text, f"python/pydoc_data/{name}") for name, text in sorted(texts.items())]
