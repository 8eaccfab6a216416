"""`scratchlm predict`: what a model says of texts, whatever its head is for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import refuse_existing

if TYPE_CHECKING:
    from llm_from_scratch.data.labelled import LabelledFields
    from llm_from_scratch.evaluate.predict import Predictor
    from llm_from_scratch.evaluate.prompt_likelihood import PromptClassifier, Shot
    from llm_from_scratch.text.tokenizer import Tokenizer

EXAMPLES = """\
examples:
  scratchlm predict runs/spam "You have won a prize! Call now."
  scratchlm predict runs/names "Ada Lovelace lived in London." --json
  scratchlm predict runs/similar "A cat sleeps." --pair "A kitten naps."
  scratchlm predict runs/words "The [MASK] sleeps on the sofa."
  scratchlm predict runs/spam --data new.csv --out predictions.jsonl
  scratchlm predict smollm2-135m "What a lovely film!" --labels good,bad
  scratchlm predict smollm2-135m --data test.jsonl --labels good,bad --shots few.jsonl --calibrate

A model that was trained for it answers with its own head. Any model that writes answers with
--labels: it says which of them is the likeliest to follow. TEXT stands before flags that take
several values, and - reads lines from standard input.
"""
SHOWN = 60  # characters of a text beside its answer


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="ask a model for the labels, numbers or names of texts",
        description="Ask a model about texts: a classifier for labels, a regression for numbers, "
        "a tagger for names, a masked language model for words, and any model that writes for the "
        "likeliest of the labels that you name (zero-shot, or few-shot with --shots). Rows of "
        "--data with labels are measured as well.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a model folder, a run folder, a .gguf file, or a name"
    )
    parser.add_argument(
        "texts", nargs="*", default=[], metavar="TEXT", help="the texts; - for standard input"
    )
    parser.add_argument("--data", nargs="+", metavar="FILE", help="files with rows instead")
    parser.add_argument("--out", metavar="FILE", help="write the answers here, as JSON lines")
    parser.add_argument("--pair", metavar="TEXT", help="the second text of a pair")
    parser.add_argument(
        "--choices", nargs="+", metavar="TEXT", help="the texts to choose from, for one question"
    )
    rows = parser.add_argument_group("rows of --data")
    rows.add_argument("--text_field", default="text", metavar="NAME", help="default: text")
    rows.add_argument("--pair_field", metavar="NAME", help="the second text of pairs")
    rows.add_argument("--label_field", default="label", metavar="NAME", help="default: label")
    rows.add_argument(
        "--choices_fields", nargs="+", default=["choices"], metavar="NAME",
        help="the field with a list of choices, or one for each (default: choices)",
    )  # fmt: skip
    rows.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME", help="of a table without a header"
    )
    rows.add_argument(
        "--on_bad", choices=("skip", "stop"), default="skip", help="what a broken row does"
    )
    prompt = parser.add_argument_group("labels by their likelihood")
    prompt.add_argument(
        "--labels", metavar="A,B,...",
        help="what a model that writes may answer; 0=bad,1=good asks for label 0 by the word bad",
    )  # fmt: skip
    prompt.add_argument("--shots", metavar="FILE", help="rows whose labels are shown before")
    prompt.add_argument(
        "--template", metavar="TEXT",
        help=r"with {text}, {pair} and, at its end, {label}; \n is a line end",
    )  # fmt: skip
    prompt.add_argument(
        "--normalise", default="token", metavar="token|byte|none",
        help="what a label's log-probability is divided by (default: token)",
    )  # fmt: skip
    prompt.add_argument(
        "--calibrate", action="store_true",
        help="take away how likely the labels are whatever the text",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.core.runlog import LiveLine
    from llm_from_scratch.data.records import BadRows
    from llm_from_scratch.evaluate.predict import figures_of

    check_flags(args)
    line, bad = LiveLine(), BadRows(args.on_bad)
    model = open_model(args, bad)
    kind = model.kind
    rows, wanted = given_rows(args, kind, bad)
    if args.data:
        rows, wanted = answerable(model, rows, wanted, bad)
    if not rows:
        first = f" (the first reason: {bad.sentences[0].rstrip('.')})" if bad.sentences else ""
        raise UserError(f"There is no text to predict anything of{first}.")
    answers = model.predict(rows, lambda done: line.show(f"Reading: {done:,} done"))
    line.end()
    for sentence in bad.sentences[:8]:
        line.say(f"Left out: {sentence}")
    if len(bad.sentences) > 8:
        line.say(f"Left out: {len(bad.sentences) - 8:,} more.")
    figures = figures_of(kind, model.labels, answers, wanted) if measures(kind) else {}
    found = [{**row, **one} for row, one in zip(rows, answers, strict=True)]
    if args.out is not None:
        write_answers(Path(args.out), found)
    if args.json:
        print(json.dumps({"model": args.model, "predictions": found, "figures": figures}))
        return 0
    if args.out is None:
        for row, one in zip(rows, answers, strict=True):
            print(as_line(row["text"], one))
    else:
        print(f"Written: {args.out} ({len(found):,} rows)")
    for name, value in figures.items():
        shown = f"{value:,}" if name in ("rows", "unknown_labels") else f"{value:,.4f}"
        print(f"{name.replace('_', ' '):<14} {shown}")
    return 0


def measures(kind: str) -> bool:
    """Whether answers of this kind can be held against a label."""
    return kind in ("labels", "numbers", "choices")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself, before a model is loaded."""
    if args.out is not None:
        refuse_existing(args.out)
    if bool(args.texts) == bool(args.data):
        raise UserError("Give either texts or --data FILE; one of them, not both.")
    if args.data and (args.pair is not None or args.choices):
        raise UserError(
            "--pair and --choices are for a text on the command line; with --data name the fields, "
            "by --pair_field and --choices_fields."
        )
    prompted = [args.shots, args.template, args.calibrate or None]
    if args.labels is None and any(one is not None for one in prompted):
        raise UserError(
            "--shots, --template and --calibrate are for labels by their likelihood; name the "
            "labels with --labels A,B."
        )


def open_model(args: argparse.Namespace, bad: Any) -> Predictor:
    """The model, with its own head or with the labels that were named."""
    from llm_from_scratch.evaluate.predict import Predictor
    from llm_from_scratch.weights.sources import load

    model, tokenizer = load(args.model, device=args.device)
    asked = model if args.labels is None else prompted(args, model, tokenizer, bad)
    return Predictor(asked, tokenizer, args.model)


def prompted(
    args: argparse.Namespace, model: Any, tokenizer: Tokenizer, bad: Any
) -> PromptClassifier:
    """The model, asked for --labels."""
    from llm_from_scratch.evaluate.prompt_likelihood import (
        PAIR_TEMPLATE,
        TEMPLATE,
        PromptClassifier,
        PromptSettings,
        Shot,
    )

    paired = args.pair is not None or args.pair_field is not None
    template = args.template or (PAIR_TEMPLATE if paired else TEMPLATE)
    settings = PromptSettings(template.replace("\\n", "\n"), args.normalise, args.calibrate)
    labels = [label.strip() for label in args.labels.split(",")]
    shots: list[Shot] = []
    if args.shots is not None:
        rows, wanted = rows_of_files([args.shots], args, "labels", bad)
        shots = [
            Shot(row["text"], str(label), row.get("pair", ""))
            for row, label in zip(rows, wanted, strict=True)
            if label is not None
        ]
        if not shots:
            raise UserError(f"{args.shots} has no row with a text and a label to be shown.")
    return PromptClassifier(model, tokenizer, labels, shots, settings)


def given_rows(
    args: argparse.Namespace, kind: str, bad: Any
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The rows to predict, and what is wanted of each (None where nothing is known)."""
    if args.data:
        return rows_of_files(args.data, args, kind, bad)
    rows: list[dict[str, Any]] = []
    for text in texts_of(args.texts):
        row: dict[str, Any] = {"text": text}
        if args.pair is not None:
            row["pair"] = args.pair
        if args.choices:
            row["choices"] = args.choices
        rows.append(row)
    return rows, [None] * len(rows)


def texts_of(texts: Sequence[str]) -> Iterator[str]:
    """The texts; those of standard input, line by line, for '-'."""
    from llm_from_scratch.cli.generate import stdin_lines
    from llm_from_scratch.text.tokenizer import without_surrogates

    for text in texts:
        found = (line.rstrip("\n") for line in stdin_lines()) if text == "-" else [text]
        yield from (without_surrogates(one) for one in found if one.strip())


def rows_of_files(
    paths: Sequence[str], args: argparse.Namespace, kind: str, bad: Any
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Rows of files with their places, and what their labels say, if they have any."""
    from llm_from_scratch.data.labelled import LabelledFields
    from llm_from_scratch.data.records import BadRow, read_rows

    fields = LabelledFields(
        args.text_field, args.pair_field, args.label_field, tuple(args.choices_fields)
    )
    rows: list[dict[str, Any]] = []
    wanted: list[Any] = []
    for path in paths:
        for row in read_rows(path, bad, tuple(args.columns)):
            try:
                found = fields.texts(row.values, choices=kind == "choices")
                label = label_of(fields, row.values, kind, found)
            except BadRow as error:
                bad(f"{row.place}: {error}")
                continue
            rows.append({"place": row.place, **found})
            wanted.append(label)
    return rows, wanted


def answerable(
    model: Predictor, rows: Sequence[dict[str, Any]], wanted: Sequence[Any], bad: Any
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The rows that the model can answer, and what is wanted of them; `bad` is told of others."""
    from llm_from_scratch.data.records import BadRow

    kept: list[tuple[dict[str, Any], Any]] = []
    for row, want in zip(rows, wanted, strict=True):
        try:
            model.check(row)
            kept.append((row, want))
        except BadRow as error:
            bad(f"{row['place']}: {error}")
    return [row for row, _ in kept], [want for _, want in kept]


def label_of(
    fields: LabelledFields, values: Mapping[str, Any], kind: str, found: Mapping[str, Any]
) -> Any:
    """What a row wants; None without a label, since rows to predict need none."""
    if not measures(kind) or values.get(fields.label) in (None, ""):
        return None
    return fields.wanted(values, kind, found.get("choices", ()))


def as_line(text: str, answer: Mapping[str, Any]) -> str:
    """An answer in one line, and behind it the beginning of its text."""
    if "value" in answer:
        said = f"{answer['value']:.4f}"
    elif "entities" in answer:
        names = [f"{one['text']} ({one['type']})" for one in answer["entities"]]
        said = ", ".join(names) or "no names"
    elif "words" in answer:
        said = " / ".join(
            ", ".join(f"{one['word']} ({one['probability']:.2f})" for one in guesses)
            for guesses in answer["words"]
        )
    elif "labels" in answer:
        said = ", ".join(answer["labels"]) or "no label"
    else:
        said = f"{answer.get('label', answer.get('text'))}  {answer['probability']:.2f}"
    short = " ".join(text.split())
    short = short if len(short) <= SHOWN else f"{short[: SHOWN - 1]}…"
    return f"{said}  |  {short}"


def write_answers(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a row."""
    from llm_from_scratch.core.files import write_aside

    with write_aside(path) as file:
        for row in found:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
