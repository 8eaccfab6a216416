"""Learning a Unigram vocabulary of Japanese: ours beside the `sentencepiece` package's trainer.

    python benchmarks/unigram_training.py --out benchmarks/results/unigram_training.json

Eight of nine works of Aozora Bunko are learnt from, every ninth is held out. Both read the same
texts from memory and learn 8,000 entries: two special tokens, 256 bytes, and pieces; the frequent
characters up to 99.95 % of the text have pieces of their own. How long the tokens of the held-out
lines are is counted without line ends, which sentencepiece does not see. Neither normalises.
sentencepiece gets what makes its tokens long (no space put before a line) and all threads; ours
uses one. They take turns in one process, `--runs` times. Two ways of cutting words are ours:

- `ours`: about a bunsetsu, and its punctuation, as `train_tokenizer(language="ja")` does;
- `ours, their cuts`: where sentencepiece cuts, between scripts and before spaces.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import sentencepiece
from common import data_file, parser, record, wait_for_quiet

from llm_from_scratch.text.training import train_tokenizer

FILE = "aozora/aozora_clean.jsonl.gz"
SIZE, COVERAGE = 8000, 0.9995
# Runs of one script: kana count as kanji there, and digits and signs as one.
THEIR_CUTS = (
    r" ?(?:[\p{Han}\p{Hiragana}\p{Katakana}ー]+|(?:(?![ー \n])\p{Common})+|\p{Latin}+|\p{Greek}+"
    r"|\p{Cyrillic}+)|\n| |."
)
Encoder = Callable[[list[str]], list[list[int]]]


def ours(works: list[str], pattern: str | None = None) -> tuple[int, Encoder]:
    """From texts to a usable tokenizer: its entries, and how it encodes."""
    tokenizer = train_tokenizer(
        works,
        kind="unigram",
        vocab_size=SIZE,
        language="ja",
        pattern=pattern,
        character_coverage=COVERAGE,
    )
    return tokenizer.vocab_size, tokenizer.encode_batch


def theirs(works: list[str]) -> tuple[int, Encoder]:
    """The same with the `sentencepiece` package."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for work in works for line in work.split("\n")),
        model_writer=model,
        model_type="unigram",
        vocab_size=SIZE,
        character_coverage=COVERAGE,
        byte_fallback=True,
        bos_id=-1,  # leaves </s> and <unk>, two special tokens as ours has
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 20,  # all lines, as ours
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return processor.vocab_size(), processor.encode


TRAINERS: dict[str, Callable[[list[str]], tuple[int, Encoder]]] = {
    "sentencepiece": theirs,
    "ours": ours,
    "ours, their cuts": lambda works: ours(works, THEIR_CUTS),
}


def main() -> None:
    arguments = parser(__doc__, "unigram_training.json")
    arguments.add_argument("--runs", type=int, default=3)
    args = arguments.parse_args()
    with gzip.open(data_file(FILE), "rt", encoding="utf-8") as file:
        works = [json.loads(line)["text"] for line in file]
    seen = [work for number, work in enumerate(works) if number % 9 != 4]
    held_out = [line for work in works[4::9] for line in work.split("\n")]
    size = sum(len(line.encode()) for line in held_out)
    wait_for_quiet(args.force)
    runs: list[dict[str, Any]] = []
    for _ in range(args.runs):
        for who, train in TRAINERS.items():
            start = time.perf_counter()
            entries, encode = train(seen)
            seconds = time.perf_counter() - start
            length = size / sum(map(len, encode(held_out)))
            run = {"who": who, "seconds": seconds, "entries": entries, "bytes_per_token": length}
            runs.append(run)
            print(f"{who:18} {seconds:6.2f} s  {length:.4f} bytes per token", flush=True)

    def median(who: str, what: str) -> float:
        return statistics.median(run[what] for run in runs if run["who"] == who)

    seconds_of = {who: median(who, "seconds") for who in TRAINERS}
    length_of = {who: median(who, "bytes_per_token") for who in TRAINERS}
    result = {
        "vocab_size": SIZE,
        "character_coverage": COVERAGE,
        "bytes_learnt_from": sum(len(work.encode()) for work in seen),
        "bytes_held_out": size,
        "sentencepiece_threads": os.cpu_count() or 1,
        "runs": runs,
        "median_seconds": seconds_of,
        "bytes_per_token": length_of,
        "seconds_over_sentencepiece": {
            who: seconds_of[who] / seconds_of["sentencepiece"] for who in TRAINERS
        },
        "bytes_per_token_over_sentencepiece": {
            who: length_of[who] / length_of["sentencepiece"] for who in TRAINERS
        },
    }
    record(args.out, result, [FILE], ["sentencepiece"])


if __name__ == "__main__":
    main()
