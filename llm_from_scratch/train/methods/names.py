"""The methods' names: which module holds each, and what the help says of it before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """Where a method is, what it is for, and how it is called."""

    module: str
    cls: str
    purpose: str
    examples: tuple[str, ...]


METHODS: dict[str, Name] = {
    "sft": Name(
        "sft",
        "Sft",
        "learn to answer, from instructions and chats",
        (
            "scratchlm finetune sft smollm2-135m --data chats.jsonl --out runs/chat",
            "scratchlm finetune sft smollm2-135m --data chats.jsonl --lora.rank 16 --out runs/lora",
            "scratchlm finetune sft smollm2-135m --data chats.jsonl --show_masks 3",
        ),
    ),
    "classify": Name(
        "classify",
        "Classify",
        "learn labels, numbers or choices for texts and pairs of texts",
        (
            "scratchlm finetune classify all-minilm-l6-v2 --data reviews.csv --out runs/reviews",
            "scratchlm finetune classify smollm2-135m --data sms.tsv --data.columns label text "
            "--classify.balance true --lora.rank 8 --out runs/sms",
            "scratchlm finetune classify all-minilm-l6-v2 --data pairs.jsonl --out runs/sts "
            "--classify.kind numbers --classify.text_field sentence1 "
            "--classify.pair_field sentence2",
        ),
    ),
    "mlm": Name(
        "mlm",
        "Mlm",
        "go on with the training of an encoder: guess masked words of your own texts",
        (
            "scratchlm finetune mlm all-minilm-l6-v2 --data texts/ --out runs/words",
            "scratchlm finetune mlm bert/ --data texts.jsonl --mlm.whole_words true "
            "--out runs/words",
        ),
    ),
    "ner": Name(
        "ner",
        "Ner",
        "find names in texts: people, places, products",
        (
            "scratchlm finetune ner all-minilm-l6-v2 --data train.conll --val dev.conll "
            "--out runs/names",
            "scratchlm finetune ner smollm2-135m --data entities.jsonl --ner.twice true "
            "--lora.rank 16 --out runs/names-ja",
        ),
    ),
    "seq2seq": Name(
        "seq2seq",
        "Seq2Seq",
        "learn to write one text for another: summaries, headlines, translations",
        (
            "scratchlm finetune seq2seq t5-small/ --data news.jsonl --out runs/headlines "
            "--seq2seq.template 'summarize: {source}'",
            "scratchlm finetune seq2seq smollm2-135m --data articles.csv --out runs/summaries "
            "--seq2seq.source_field text --seq2seq.target_field title --lora.rank 16",
        ),
    ),
    "dpo": Name(
        "dpo",
        "Dpo",
        "learn which of two answers is better (DPO, IPO, SimPO)",
        (
            "scratchlm finetune dpo runs/chat --data preferences.jsonl --out runs/dpo",
            "scratchlm finetune dpo runs/chat --data preferences.jsonl --dpo.loss simpo "
            "--lora.rank 16 --train.learning_rate 1e-5 --out runs/simpo",
        ),
    ),
    "grpo": Name(
        "grpo",
        "Grpo",
        "learn from its own answers, which rules check",
        (
            "scratchlm finetune grpo runs/chat --data sums.jsonl --out runs/grpo",
            "scratchlm finetune grpo runs/chat --data tasks.jsonl --grpo.rewards json exact "
            "--out runs/json",
        ),
    ),
}
