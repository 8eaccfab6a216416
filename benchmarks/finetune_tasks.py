"""The tasks of benchmarks/finetune.py: which rows, which method and settings, what was published.

Data are divided by `DATA`; every task on the same data has the same rows. Settings were
chosen on the validation rows, never on those that are reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Data:
    """Rows that are divided once for all tasks on them, or once for each seed.

    method, settings: whose reading and checking apply (`{"classify": {...}, "data": {...}}`).
    train, val, test: files below $SCRATCHLM_DATA; without the last two a share is drawn by seed 1.
    like: another data's name, and the fields by which a row of this one is in the same part: two
        data from the same prompts must not be divided differently.
    by_seed: the seed of a run also says how its rows are divided: of a test of 200 rows, which
        ones they are matters more than how the model was trained.
    """

    method: str
    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    like: str = ""
    key: tuple[str, ...] = ()
    by_seed: bool = False


@dataclass(frozen=True)
class Task:
    """One row of the table.

    figures: names in summary.json; the first is the one that `target` is about (at least so much).
    after: the task whose model this one starts from, in place of `model`.
    """

    data: str
    method: str
    model: str
    settings: dict[str, Any]
    figures: tuple[str, ...]
    target: float | None = None
    published: str = ""
    seeds: tuple[int, ...] = (1,)
    after: str = ""


DATA: dict[str, Data] = {
    "sms": Data(
        "classify",
        ("sms-spam/SMSSpamCollection.tsv",),
        settings={
            "data": {"columns": ["label", "text"], "val_fraction": 0.1, "test_fraction": 0.2},
            "classify": {"balance": True, "positive": "spam"},
        },
        by_seed=True,
    ),
    "sst2": Data(
        "classify",
        ("sst2/train.tsv",),
        test=("sst2/dev.tsv",),
        settings={"data": {"columns": ["text", "label"], "val_fraction": 0.1}},
    ),
    "rt-polarity": Data(
        "classify",
        ("rt-polarity/rt-polarity.pos.txt", "rt-polarity/rt-polarity.neg.txt"),
        settings={"classify": {"label_field": "file"}},
    ),
    "stsb": Data(
        "classify",
        ("stsb-en-ja/stsb-en-train.csv",),
        val=("stsb-en-ja/stsb-en-dev.csv",),
        test=("stsb-en-ja/stsb-en-test.csv",),
        settings={
            "data": {"columns": ["sentence1", "sentence2", "score"]},
            "classify": {
                "kind": "numbers", "text_field": "sentence1", "pair_field": "sentence2",
                "label_field": "score",
            },
        },
    ),
    "stockmark": Data("ner", ("stockmark-ner-ja/ner_shared.json.gz",)),
    "wnut17": Data(
        "ner", ("wnut17/train.conll",), val=("wnut17/dev.conll",), test=("wnut17/test.conll",)
    ),
    "uner-ewt": Data(
        "ner", ("uner-ewt/en_ewt-ud-dev.iob2",), test=("uner-ewt/en_ewt-ud-test.iob2",)
    ),
    "instructions": Data(
        "sft",
        ("instruction-data/instruction-data.json",),
        settings={"data": {"val_fraction": 0.05, "test_fraction": 0.1}},
    ),
    "preferences": Data(
        "dpo",
        ("instruction-preference/instruction-data-with-preference.json",),
        like="instructions",
        key=("instruction", "input"),
    ),
}  # fmt: skip

TASKS: dict[str, Task] = {
    "SMS spam": Task(
        "sms", "classify", "all-mpnet-base-v2",
        {"train": {"epochs": 3, "learning_rate": 5e-5, "batch_size": 16, "eval_every": 25}},
        ("test_accuracy", "test_f1"), 0.98, "95.67 % (GPT-2 124M, last block)", (1, 2, 3),
    ),
    "SMS spam, LoRA": Task(
        "sms", "classify", "all-mpnet-base-v2",
        {
            "train": {"epochs": 3, "learning_rate": 3e-4, "batch_size": 16, "eval_every": 25},
            "lora": {"rank": 8},
        },
        ("test_accuracy", "test_f1"), None, "within 0.5 points of full", (1, 2, 3),
    ),
    "SST-2": Task(
        "sst2", "classify", "all-mpnet-base-v2",
        {"train": {"epochs": 1, "learning_rate": 3e-5, "batch_size": 32, "eval_every": 60}},
        ("test_accuracy", "test_f1"), 0.88, "about 93 % (BERT base, all of GLUE's rows)",
    ),
    "rt-polarity": Task(
        "rt-polarity", "classify", "all-mpnet-base-v2",
        {"train": {"epochs": 1, "learning_rate": 3e-5, "batch_size": 32, "eval_every": 60}},
        ("test_accuracy", "test_f1"), 0.84, "81.5 % (CNN, Kim 2014)",
    ),
    "STS-B": Task(
        "stsb", "classify", "all-minilm-l6-v2",
        {"train": {"epochs": 4, "learning_rate": 1e-4, "batch_size": 32, "eval_every": 60}},
        ("test_spearman", "test_pearson"), 0.80, "0.820 (all-MiniLM-L6-v2, cosine)",
    ),
    # MiniLM knows English: a quarter of its tokens of Japanese are [UNK], and what it could reach
    # at best is test_reachable_f1. The validation loss is least long before the validation F1 is
    # greatest, so that in these three tasks the last model is taken.
    "Stockmark NER": Task(
        "stockmark", "ner", "all-minilm-l6-v2",
        {"train": {"epochs": 5, "learning_rate": 3e-4, "eval_every": 200, "keep_best": False}},
        ("test_f1", "test_precision", "test_recall", "test_reachable_f1"), None,
        "0.90 (Tohoku BERT base v3 with a CRF; 0.87 without)",
    ),
    "WNUT17": Task(
        "wnut17", "ner", "all-mpnet-base-v2",
        {"train": {"epochs": 2, "learning_rate": 1e-4, "eval_every": 200, "keep_best": False}},
        ("test_f1", "test_precision", "test_recall"), None,
        "0.419 (best of the shared task)",
    ),
    "UNER-EWT": Task(
        "uner-ewt", "ner", "all-mpnet-base-v2",
        {"train": {"epochs": 4, "learning_rate": 1e-4, "keep_best": False}},
        ("test_f1", "test_precision", "test_recall"), None,
        "0.86 (XLM-R large, on the whole training file)",
    ),
    "Instructions": Task(
        "instructions", "sft", "smollm2-135m",
        {
            "train": {
                "epochs": 1.5, "batch_size": 8, "learning_rate": 5e-5, "warmup_steps": 10,
                "eval_every": 40,
            },
            "sft": {
                "template": "alpaca", "loss_on": "all", "eval_rows": 55, "max_new_tokens": 64,
            },
        },
        (
            "best_val_loss", "test_answer_loss", "test_bits_per_byte", "test_chrf", "test_rougeL",
        ),
    ),
    "instruction-preference, SFT": Task(
        "preferences", "sft", "smollm2-135m",
        {
            "train": {
                "epochs": 1, "batch_size": 8, "learning_rate": 2e-4, "warmup_steps": 5,
                "eval_every": 40,
            },
            "lora": {"rank": 16},
            "sft": {"template": "alpaca", "eval_rows": 16, "max_new_tokens": 64},
        },
        ("test_bits_per_byte", "test_chrf", "test_rougeL"),
    ),
    "instruction-preference, DPO": Task(
        "preferences", "dpo", "",
        {
            "train": {
                "epochs": None, "max_steps": 160, "batch_size": 8, "learning_rate": 2e-4,
                "warmup_steps": 5, "eval_every": 40,
            },
            "lora": {"rank": 16},
            "dpo": {"sft_weight": 1.0, "max_new_tokens": 64},
        },
        (
            "test_reward_accuracy", "test_chosen_logprob_per_token", "test_reward_margin",
            "test_chosen_not_less",
        ),
        0.9, "reward margin 2.0 (GPT-2 355M, all weights)", after="instruction-preference, SFT",
    ),
}  # fmt: skip
