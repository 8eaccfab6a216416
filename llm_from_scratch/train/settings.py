"""The settings of a training run: the `train`, `data` and `tokenizer` parts of config.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.model.presets import ModelSettings
from llm_from_scratch.train.schedule import SCHEDULES

OPTIMIZERS = ("muon", "adamw")
PRECISIONS = ("auto", "bf16", "fp32")
TOKENIZERS = ("bpe", "unigram", "wordpiece", "char")
# The smallest vocabularies, and what is in them.
LEAST = {
    "bpe": (257, "the 256 bytes and <|endoftext|>"),
    "unigram": (259, "the 256 bytes, one piece, <|unk|> and <|endoftext|>"),
    "wordpiece": (3, "one piece, <|unk|> and <|endoftext|>"),
}


@dataclass(frozen=True)
class TrainSettings:
    """How to train; shared by every method."""

    max_steps: int = 1000
    """Optimiser steps."""
    epochs: float | None = None
    """Passes over the training data; given, they decide max_steps."""
    batch_size: int = 32
    """Sequences per optimiser step, over all processes."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; smaller saves memory and changes nothing else."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly; default 50, at most a tenth of all."""
    schedule: str = "wsd"
    """wsd (warm-up, stable, linear decay), cosine or constant."""
    decay_share: float = 0.6
    """Share of the steps over which wsd decays."""
    optimizer: str = "muon"
    """muon (matrices in the blocks; AdamW for the rest) or adamw."""
    muon_learning_rate: float | None = None
    """Peak learning rate of the matrices under muon; default learning_rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.95
    """AdamW's second decay rate."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 is off."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 where this machine gains from it."""
    compile: bool = False
    """Use torch.compile (needs a C++ compiler on the CPU)."""
    seed: int = 1
    """Decides the weights, the data order and dropout."""
    device: str = "auto"
    """auto (cuda, mps, cpu), or one of these."""
    eval_every: int = 200
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_tokens: int = 100_000
    """At most so many validation tokens in an evaluation during training."""
    patience: int = 0
    """Stop after so many evaluations without a better validation loss; 0 never."""
    keep_best: bool = True
    """Whether model/ is the one with the best validation loss; false: the last one."""
    sample_every: int = 500
    """Steps between samples in samples.md; 0 samples at the end only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    stop_after: int | None = None
    """Stop after this step as if interrupted; --resume goes on."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps", "batch_size", "keep_checkpoints", "eval_tokens", "micro_batch_size",
            "stop_after",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name} is {value}; it must be at least 1.")
        for name, choices in (
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"train.{name} is '{value}'; it must be one of {', '.join(choices)}."
                    + nearest(value, choices)
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be in [0, 1).")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"train.seed is {self.seed}; it must be from 0 to 2^63 - 1.")
        for name in (
            "warmup_steps", "eval_every", "sample_every", "checkpoint_every", "patience",
            "weight_decay", "grad_clip", "min_learning_rate",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"train.{name} is {value}; it must not be negative.")
        for name in ("learning_rate", "muon_learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"train.{name} is {value}; it must be above 0.")
        if self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"train.min_learning_rate ({self.min_learning_rate}) is above train.learning_rate "
                f"({self.learning_rate}); lower the first or raise the second."
            )
        if not 0 < self.decay_share <= 1:
            raise UserError(f"train.decay_share is {self.decay_share}; it must be in (0, 1].")

    @property
    def warmup(self) -> int:
        """The steps of warm-up, given or by default."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(50, self.max_steps // 10)


@dataclass(frozen=True)
class TokenizerSettings:
    """Which tokenizer: one to train, or one that exists."""

    kind: str = "bpe"
    """bpe (byte-level), unigram, wordpiece (as BERT's, loses case and spaces) or char."""
    vocab_size: int = 4096
    """Entries of a trained vocabulary, special tokens included."""
    path: str | None = None
    """A tokenizer or model folder to use instead of training one."""

    def __post_init__(self) -> None:
        if self.kind not in TOKENIZERS:
            raise UserError(
                f"tokenizer.kind is '{self.kind}'; it must be one of {', '.join(TOKENIZERS)}."
                + nearest(self.kind, TOKENIZERS)
            )
        least, what = LEAST.get(self.kind, (1, "one token"))
        if self.path is None and self.vocab_size < least:
            raise UserError(
                f"tokenizer.vocab_size is {self.vocab_size}; it must be at least {least}: {what}."
            )


@dataclass(frozen=True)
class DataSettings:
    """Which text, and how it is cut."""

    paths: tuple[str, ...] = ()
    """Files and folders of text; `python` is the text that every Python carries."""
    language: str = "en"
    """en or ja: how text is split into words."""
    seq_len: int = 256
    """Tokens per training sequence."""
    val_fraction: float = 0.05
    """Share of the text kept for validation, in whole documents."""
    drop_duplicates: bool = True
    """Leave out near-duplicates before the split, so that validation text is new text."""
    text_field: str = "text"
    """Which field of .jsonl, .csv, .tsv and .parquet rows holds the text."""
    on_bad: str = "skip"
    """What to do with a file that cannot be read: skip (and name it) or stop."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise UserError(f"data.seq_len is {self.seq_len}; it must be at least 2.")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"data.val_fraction is {self.val_fraction}; it must be in [0, 1).")
        if self.on_bad not in ("skip", "stop"):
            raise UserError(f"data.on_bad is '{self.on_bad}'; it must be skip or stop.")
        if self.language not in ("en", "ja"):
            raise UserError(f"data.language is '{self.language}'; it must be en or ja.")


@dataclass(frozen=True)
class PretrainConfig:
    """A complete pretraining run: what stands in config.yaml."""

    out: str = ""
    """The run folder."""
    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
