"""From files of text to token shards: read, split, learn the tokenizer, encode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine, read_json, write_json
from llm_from_scratch.data.near_duplicates import drop_near_duplicates
from llm_from_scratch.data.python_corpus import python_corpus
from llm_from_scratch.data.read import Document, ReadReport, read_documents
from llm_from_scratch.data.shards import TokenStore, write_store
from llm_from_scratch.data.split import split_documents
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.train.settings import PretrainConfig

PYTHON = "python"  # the embedded corpus's name among data.paths


@dataclass
class Prepared:
    """What training needs and what its report says about the text.

    `val_bytes` is 0 where the tokenizer loses something, for then no bits per byte can be told.
    `documents` (training, validation) are there only in the process that read them.
    """

    tokenizer: Tokenizer
    train: TokenStore
    val: TokenStore | None
    val_bytes: int
    hashes: dict[str, str]
    documents: tuple[list[Document], list[Document]] | None = field(default=None, repr=False)


def gather_documents(
    config: PretrainConfig, say: Callable[[str], None]
) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents of data.paths."""
    paths = config.data.paths
    if not paths:
        raise UserError(
            "No text was given. Name files or folders with --data, or use --data python for the "
            "text that every Python carries."
        )
    if tuple(paths) == (PYTHON,):
        train, held_out = python_corpus()
        say(f"Corpus python: {size_of(train)} to train on, {size_of(held_out)} held out.")
        return train, held_out
    report = ReadReport()
    data = config.data
    documents = list(
        read_documents(paths, on_bad=data.on_bad, report=report, text_field=data.text_field)
    )
    say(report.summary())
    if data.drop_duplicates:
        documents, dropped = drop_near_duplicates(documents)
        if dropped:
            say(
                f"{len(dropped):,} near-duplicates left out, e.g. {dropped[0].document.source} "
                f"(like {dropped[0].because_of.source})."
            )
    train, val = split_documents(documents, config.data.val_fraction, config.train.seed)
    say(f"{size_of(train)} to train on, {size_of(val)} for validation.")
    return train, val


def size_of(documents: Iterable[Document]) -> str:
    """'1.2 MB in 34 documents'."""
    sizes = [len(document.text.encode()) for document in documents]
    return f"{sum(sizes) / 1e6:.2f} MB in {len(sizes):,} document{'s' * (len(sizes) != 1)}"


def text_hash(documents: Iterable[Document]) -> str:
    """SHA-256 over the texts, in order, wherever the files lie."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode() + b"\0")
    return digest.hexdigest()


def make_tokenizer(
    config: PretrainConfig, train: list[Document], val: list[Document], line: LiveLine
) -> Tokenizer:
    """The tokenizer that the settings name: loaded, or learned from the training documents.

    Only a character vocabulary looks at the validation text, too: it must know its characters.
    """
    settings = config.tokenizer
    if settings.path is not None:
        return Tokenizer.load(Path(settings.path))

    def progress(what: str, done: int, total: int) -> None:
        line.show(f"Tokenizer: {what} {done:,}" + (f" of {total:,}" if total else ""))

    char = settings.kind == "char"
    single = char and len(train) == 1  # one text: nothing to end, nothing unknown
    tokenizer = train_tokenizer(
        (document.text for document in (train + val if char else train)),
        kind=settings.kind,
        vocab_size=None if char else settings.vocab_size,
        special=() if single else ("<|endoftext|>",),
        language=config.data.language,
        unknown=not single,
        progress=progress,
    )
    line.say(f"Tokenizer: {settings.kind}, {tokenizer.vocab_size:,} entries.")
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer, documents: list[Document], line: LiveLine, batch: int = 64
) -> Iterable[list[int]]:
    """The ids of each document, a batch at a time."""
    for start in range(0, len(documents), batch):
        line.show(f"Encoding: document {start + 1:,} of {len(documents):,}")
        yield from tokenizer.encode_batch([d.text for d in documents[start : start + batch]])


def prepare(config: PretrainConfig, folder: Path, line: LiveLine) -> Prepared:
    """Read, split, train the tokenizer, encode; everything lands in the run folder."""
    train, val = gather_documents(config, line.say)
    tokenizer = make_tokenizer(config, train, val, line)
    tokenizer.save(folder / "tokenizer")
    end = tokenizer.eos_id
    stores: dict[str, TokenStore] = {}
    for name, documents in (("train", train), ("val", val)):
        if not documents:
            continue
        stores[name] = write_store(
            folder / "tokens" / name,
            encode_documents(tokenizer, documents, line),
            tokenizer.vocab_size,
            bos_id=end,
            eos_id=end,
            tokenizer_hash=tokenizer.fingerprint,
        )
    hashes = {"train": text_hash(train), "val": text_hash(val)}
    val_bytes = sum(len(document.text.encode()) for document in val)
    if not is_lossless(tokenizer, val):
        line.say("This tokenizer loses parts of the text, so no bits per byte will be told.")
        val_bytes = 0
    write_json(folder / "tokens" / "text.json", {"sha256": hashes, "val_bytes": val_bytes})
    line.say(f"{len(stores['train']):,} training tokens.")
    store, val_store = stores["train"], stores.get("val")
    return Prepared(tokenizer, store, val_store, val_bytes, hashes, (train, val))


def is_lossless(tokenizer: Tokenizer, documents: list[Document], most: int = 200_000) -> bool:
    """Whether the first `most` characters come back from their ids exactly as they were."""
    for document in documents:
        text = document.text[:most]
        if tokenizer.decode(tokenizer.encode(text)) != text:
            return False
        most -= len(text)
        if most <= 0:
            break
    return True


def reopen(folder: Path) -> Prepared:
    """What `prepare` left in a run folder; a file that was changed since is refused."""
    text = read_json(folder / "tokens" / "text.json")
    val = folder / "tokens" / "val"
    stores = [TokenStore.open(folder / "tokens" / "train")]
    if val.is_dir():
        stores.append(TokenStore.open(val))
    for store in stores:
        store.verify()
    return Prepared(
        Tokenizer.load(folder / "tokenizer"),
        stores[0],
        stores[1] if len(stores) > 1 else None,
        text["val_bytes"],
        text["sha256"],
    )
