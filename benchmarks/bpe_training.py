"""Time of learning a byte-level BPE vocabulary: ours beside the `tokenizers` package's trainer.

    python benchmarks/bpe_training.py --out benchmarks/results/bpe_training.json

Both read the same texts from memory, cut them by the same pattern and learn the same number of
entries (pairs that occur at least twice), in one process and one after the other, `--runs` times.
`tokenizers` uses all cores that RAYON_NUM_THREADS allows; ours uses one. The data is found through
$SCRATCHLM_DATA (or shared/data beside the checkout):

- `bpe-reference/corpus.en` (stanford-cs336/assignment1-basics, tests/fixtures/), 500 entries;
- `aozora/aozora_clean.jsonl.gz` (425 works of Aozora Bunko, from aozorahack/aozorabunko_text),
  8,192 entries, with GPT-2's pattern and with our Japanese one.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import tokenizers
from common import data_file, parser, record, wait_for_quiet
from tokenizers import Regex, models, pre_tokenizers, trainers

from llm_from_scratch.text.pretokenize import GPT2_PATTERN, JAPANESE_PATTERN
from llm_from_scratch.text.training import END_OF_TEXT, train_tokenizer


def train_ours(texts: list[str], size: int, pattern: str) -> int:
    """From texts to a usable tokenizer; returns the number of entries."""
    return train_tokenizer(texts, vocab_size=size, pattern=pattern).vocab_size


def train_theirs(texts: list[str], size: int, pattern: str) -> int:
    """The same with the `tokenizers` package."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel
    if pattern == GPT2_PATTERN:
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        letters = byte_level(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return int(tokenizer.get_vocab_size())


def timed(train: Callable[[list[str], int, str], int], *corpus: Any) -> dict[str, Any]:
    start = time.perf_counter()
    entries = train(*corpus)
    return {"seconds": time.perf_counter() - start, "entries": entries}


def corpora() -> dict[str, tuple[list[str], int, str]]:
    """Name -> texts, vocabulary size, pattern."""
    english = data_file("bpe-reference/corpus.en")
    aozora = data_file("aozora/aozora_clean.jsonl.gz")
    with gzip.open(aozora, "rt", encoding="utf-8") as file:
        works = [json.loads(line)["text"] for line in file]
    return {
        "reference-500": ([english.read_text("utf-8")], 500, GPT2_PATTERN),
        "aozora-8192-gpt2-pattern": (works, 8192, GPT2_PATTERN),
        "aozora-8192-japanese-pattern": (works, 8192, JAPANESE_PATTERN),
    }


def held_out_bytes_per_token() -> dict[str, float]:
    """Every ninth work of Aozora Bunko held out: how long its tokens are, by pattern."""
    works = corpora()["aozora-8192-japanese-pattern"][0]
    held_out = works[4::9]
    seen = [work for number, work in enumerate(works) if number % 9 != 4]
    size = sum(len(text.encode()) for text in held_out)
    result = {}
    for name, pattern in (("gpt2", GPT2_PATTERN), ("japanese", JAPANESE_PATTERN)):
        tokenizer = train_tokenizer(seen, vocab_size=8192, pattern=pattern)
        result[name] = size / sum(map(len, tokenizer.encode_batch(held_out)))
    return result


def main() -> None:
    arguments = parser(__doc__, "bpe_training.json")
    arguments.add_argument("--runs", type=int, default=3)
    args = arguments.parse_args()
    wait_for_quiet(args.force)
    threads = os.environ.get("RAYON_NUM_THREADS", "all")
    result: dict[str, Any] = {"rayon_num_threads": threads, "corpora": {}}
    for name, (texts, size, pattern) in corpora().items():
        runs: list[dict[str, Any]] = []
        for _ in range(args.runs):
            for who, train in (("ours", train_ours), ("tokenizers", train_theirs)):
                runs.append({"who": who, **timed(train, texts, size, pattern)})
                print(f"{name:30} {who:10} {runs[-1]['seconds']:7.2f} s", flush=True)
        median = {
            who: statistics.median(run["seconds"] for run in runs if run["who"] == who)
            for who in ("ours", "tokenizers")
        }
        result["corpora"][name] = {
            "bytes": sum(len(text.encode()) for text in texts),
            "vocab_size": size,
            "runs": runs,
            "median_seconds": median,
            "ours_over_tokenizers": median["ours"] / median["tokenizers"],
        }
        print(f"{name:30} ours / tokenizers = {median['ours'] / median['tokenizers']:.2f}")
    result["aozora_held_out_bytes_per_token"] = held_out_bytes_per_token()
    print("held-out bytes per token:", result["aozora_held_out_bytes_per_token"])
    files = ["bpe-reference/corpus.en", "aozora/aozora_clean.jsonl.gz"]
    record(args.out, result, files, ["tokenizers"])


if __name__ == "__main__":
    main()
