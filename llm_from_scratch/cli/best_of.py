"""`scratchlm generate --best_of N`: draw several texts, and print the best of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from llm_from_scratch.core.errors import UserError

if TYPE_CHECKING:
    from llm_from_scratch.generate.best_of import Candidate, Consensus
    from llm_from_scratch.generate.requests import Writer
    from llm_from_scratch.generate.settings import SamplingSettings
    from llm_from_scratch.text.tokenizer import Tokenizer

LIKELIHOOD, VOTES = "likelihood", "votes"
TEMPERATURE = 0.8  # unless told: several texts are to differ


def add_best_of_arguments(parser: argparse.ArgumentParser) -> None:
    """How many texts are drawn, and what decides between them."""
    group = parser.add_argument_group("best of several")
    group.add_argument(
        "--best_of", type=int, metavar="N", help="draw N texts and print the best of them"
    )
    group.add_argument(
        "--best_by",
        metavar="likelihood|votes|MODEL",
        help="the likeliest per token (default), the answer that most texts have, or the one that "
        "a reward model likes best",
    )
    group.add_argument(
        "--answer",
        metavar="PATTERN",
        help="with votes: the answer is this pattern's last match or first group (default: the "
        "last number)",
    )
    group.add_argument(
        "--good_label", metavar="LABEL", help="with a MODEL of several labels: the good one"
    )


def check_best_of(args: argparse.Namespace) -> None:
    """Refuse what cannot be done, or would have no effect, while there is no model yet."""
    if args.best_of is None:
        for name in ("best_by", "answer", "good_label"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} decides between several texts; add --best_of N.")
        return
    from llm_from_scratch.generate.best_of import check_drawing

    check_drawing(args.best_of, {"temperature": args.temperature, "num_beams": args.num_beams})
    if args.n > 1:
        raise UserError("--best_of prints one text and --n several; give one of the two.")
    if args.answer is not None and args.best_by != VOTES:
        raise UserError("--answer says where the answer stands that is voted for: --best_by votes.")
    if args.good_label is not None and args.best_by in (None, LIKELIHOOD, VOTES):
        raise UserError("--good_label is a label of a reward model; name it with --best_by MODEL.")
    if args.answer is not None:
        from llm_from_scratch.evaluate.verifiers import compiled

        compiled(args.answer)


def print_best(
    args: argparse.Namespace,
    model: Writer,
    tokenizer: Tokenizer,
    prompt: str,
    settings: SamplingSettings,
    options: dict[str, Any],
) -> int:
    """Draw, choose and print: the text on standard output, why it was chosen on standard error."""
    from llm_from_scratch.cli.convert import waiting
    from llm_from_scratch.generate.best_of import Likelihood, consensus, ranked

    by = args.best_by or LIKELIHOOD
    agreed: Consensus | None = None
    scorer: Any = Likelihood()
    if by not in (LIKELIHOOD, VOTES):  # it may be missing: before anything is written
        from llm_from_scratch.evaluate.choosing import RewardModel

        scorer = RewardModel.open(by, device=args.device, label=args.good_label)
    with waiting(f"Writing {args.best_of} texts ...", when=True):
        drawn = candidates(args, model, tokenizer, prompt, settings, options)
    if by == VOTES:
        from llm_from_scratch.evaluate.choosing import found_by, number_in

        agreed = consensus(drawn, number_in if args.answer is None else found_by(args.answer))
        order = agreed.candidates
    else:
        order = ranked(prompt, drawn, scorer)
    if args.json:
        print(json.dumps(told(args, prompt, settings, by, order, agreed), ensure_ascii=False))
        return 0
    if agreed is None:
        worst = order[-1].score
        print(f"Best of {len(order)} by {by}: {order[0].score:.4f} (the last: {worst:.4f}).",
              file=sys.stderr)  # fmt: skip
    elif agreed.answer is None:
        print(f"None of {len(order)} texts has an answer; this is the first.", file=sys.stderr)
    else:
        most = agreed.votes[agreed.answer]
        print(f"{most} of {len(order)} texts say {agreed.answer}.", file=sys.stderr)
    print(order[0].text, flush=True)
    return 0


def candidates(
    args: argparse.Namespace,
    model: Writer,
    tokenizer: Tokenizer,
    prompt: str,
    settings: SamplingSettings,
    options: dict[str, Any],
) -> list[Candidate]:
    """The texts that are drawn: continuations, or with --chat answers."""
    from llm_from_scratch.generate.best_of import draw, draw_replies
    from llm_from_scratch.generate.chat import LocalChat, settings_fields

    fields = settings_fields(settings)
    del fields["n"]
    if not args.chat:
        return draw(model, tokenizer, prompt, args.best_of, options=options, **fields)
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    chat = LocalChat(model, tokenizer, options=options)
    return draw_replies(chat, messages, args.best_of, **fields)


def told(
    args: argparse.Namespace,
    prompt: str,
    settings: SamplingSettings,
    by: str,
    order: list[Candidate],
    agreed: Consensus | None,
) -> dict[str, Any]:
    """What --json prints: the best text, all candidates (best first), and the votes."""

    def plain(one: Candidate) -> dict[str, Any]:
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(one).items()
        }

    votes = {} if agreed is None else {"answer": agreed.answer, "votes": agreed.votes}
    return {
        "model": args.model,
        "prompt": prompt,
        "text": order[0].text,
        "best_by": by,
        **votes,
        "candidates": [plain(one) for one in order],
        "settings": dataclasses.asdict(settings),
    }
