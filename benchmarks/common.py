"""What every benchmark needs: the data, a quiet machine, and a JSON with all raw runs."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llm_from_scratch.core.device import environment
from llm_from_scratch.core.files import write_aside

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLACES = ("--work", "--keep", "--images", "--out")  # flags that name one

# Public sources of the files that the benchmarks read (owner/name on GitHub, path there).
SOURCES = {
    "tinyshakespeare/input.txt": "karpathy/char-rnn: data/tinyshakespeare/input.txt",
    "aozora/aozora_clean.jsonl.gz": "aozorahack/aozorabunko_text (425 works, cleaned)",
    "gutenberg/carroll-alice.txt": "teropa/nlp: resources/corpora/gutenberg/carroll-alice.txt",
    "wikitext2-valid/wiki.valid.tokens": (
        "pytorch/examples: word_language_model/data/wikitext-2/valid.txt"
    ),
    "c4-demo/c4_demo.jsonl": "hiyouga/LLaMA-Factory: data/c4_demo.jsonl",
    "instruction-data/instruction-data.json": (
        "rasbt/LLMs-from-scratch: ch07/01_main-chapter-code/instruction-data.json"
    ),
    "sms-spam/SMSSpamCollection.tsv": (
        "krishnaik06/Huggingfacetransformer: SMSSpamCollection (UCI SMS Spam Collection)"
    ),
    "sst2/train.tsv": "clairett/pytorch-sentiment-classification: data/SST2/train.tsv",
    "sst2/dev.tsv": "clairett/pytorch-sentiment-classification: data/SST2/dev.tsv",
    "rt-polarity/rt-polarity.pos.txt": "nltk/nltk_data: packages/corpora/sentence_polarity.zip",
    "rt-polarity/rt-polarity.neg.txt": "nltk/nltk_data: packages/corpora/sentence_polarity.zip",
    "stsb-en-ja/stsb-en-train.csv": "PhilipMay/stsb-multi-mt: data/stsb-en-train.csv",
    "stsb-en-ja/stsb-en-dev.csv": "PhilipMay/stsb-multi-mt: data/stsb-en-dev.csv",
    "stsb-en-ja/stsb-en-test.csv": "PhilipMay/stsb-multi-mt: data/stsb-en-test.csv",
    "stockmark-ner-ja/ner_shared.json.gz": (
        "stockmarkteam/ner-wikipedia-dataset: ner.json (4,234 of 5,343 rows)"
    ),
    "wnut17/train.conll": "leondz/emerging_entities_17: wnut17train.conll",
    "wnut17/dev.conll": "leondz/emerging_entities_17: emerging.dev.conll",
    "wnut17/test.conll": "leondz/emerging_entities_17: emerging.test.annotated",
    "uner-ewt/en_ewt-ud-dev.iob2": "UniversalNER/UNER_English-EWT: en_ewt-ud-dev.iob2",
    "uner-ewt/en_ewt-ud-test.iob2": "UniversalNER/UNER_English-EWT: en_ewt-ud-test.iob2",
    "instruction-preference/instruction-data-with-preference.json": (
        "rasbt/LLMs-from-scratch: ch07/04_preference-tuning-with-dpo/"
        "instruction-data-with-preference.json"
    ),
    "bpe-reference/corpus.en": "stanford-cs336/assignment1-basics: tests/fixtures/corpus.en",
}


def data_file(name: str) -> Path:
    """A file of `$SCRATCHLM_DATA` (or shared/data beside the checkout); leaves when missing."""
    folder = Path(os.environ.get("SCRATCHLM_DATA", ROOT.parent / "shared" / "data"))
    path = folder / name
    if not path.is_file():
        sys.exit(f"{name} is missing: set SCRATCHLM_DATA (source: {SOURCES.get(name, '?')}).")
    return path


def parser(description: str, out: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, default=RESULTS / out, help="where the JSON goes")
    made.add_argument("--force", action="store_true", help="measure on a busy machine, too")
    return made


def wait_for_quiet(force: bool, limit: float = 0.35, patience_s: float = 120.0) -> None:
    """Refuse to measure while others use the processor (share of all cores over two seconds)."""
    if force or not Path("/proc/stat").exists():
        return
    end = time.monotonic() + patience_s
    while True:
        busy = _busy_share()
        if busy < limit:
            return
        if time.monotonic() > end:
            sys.exit(f"This machine is busy ({busy:.0%}); stop other work or give --force.")


def _busy_share(seconds: float = 2.0) -> float:
    def read() -> tuple[int, int]:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        return sum(fields), fields[3] + fields[4]

    before = read()
    time.sleep(seconds)
    after = read()
    return 1 - (after[1] - before[1]) / max(1, after[0] - before[0])


def commit() -> str:
    """The commit that is measured; "+" marks changes that are not in it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--", "llm_from_scratch"], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shared_arguments() -> list[str]:
    """The command's arguments without folders and files, which are places on one machine."""
    found = list(sys.argv[1:])
    for flag in PLACES:
        if flag in found:
            place = found.index(flag)
            del found[place : place + 2]
        found = [argument for argument in found if not argument.startswith(f"{flag}=")]
    return found


def record(out: Path, results: dict[str, Any], files: list[str], peers: list[str]) -> None:
    """Write results with command, commit, versions, hardware and the files' hashes."""
    from importlib import metadata

    value = {
        "command": " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *shared_arguments()]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "peers": {name: metadata.version(name) for name in peers},
        "files": {
            name: {"sha256": sha256(data_file(name)), "source": SOURCES[name]} for name in files
        },
        "results": results,
    }
    with write_aside(out) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
    print(f"\nWritten to {out}")


def median(values: list[float]) -> float:
    return statistics.median(values)
