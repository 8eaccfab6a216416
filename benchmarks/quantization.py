"""What few bits cost: size, speed and perplexity of SmolLM2-135M, method by method.

The model arrives as a GGUF in Q4_1, so the original is itself of 4 bits; every method starts from
those weights as numbers. Perplexity on texts that nothing was chosen or calibrated on: the
validation part of WikiText-2, and every tenth work of Aozora Bunko. GPTQ and Wanda see web pages of
C4 and other works of Aozora Bunko. Embedding and norms stay in bf16 (in the GGUF: Q8_0 and fp32).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import commit, data_file, median, parser, record, wait_for_quiet

import llm_from_scratch as llm
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.train.prune import prune
from llm_from_scratch.train.quantize import quantize
from llm_from_scratch.weights.convert import convert
from llm_from_scratch.weights.packing import packed_layers

MODEL = "smollm2-135m"
WIKITEXT, AOZORA, C4 = (
    "wikitext2-valid/wiki.valid.tokens", "aozora/aozora_clean.jsonl.gz", "c4-demo/c4_demo.jsonl",
)  # fmt: skip
WINDOW = 1024
PROMPT, NEW = "The history of the city begins with", 64
CALIBRATION_CHARACTERS = (700_000, 200_000)  # of C4, of Aozora Bunko

# name -> the settings of `quantize`; None: as it is loaded.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "Q4_1 (the GGUF as it is)": None,
    "int8, whole rows": {"to": "int8"},
    "int4, groups of 32": {"to": "int4", "group_size": 32},
    "int4, groups of 64": {"to": "int4", "group_size": 64},
    "int4, groups of 128 (64 where they do not fit)": {"to": "int4", "group_size": 128},
    "int4, groups of 32, zero points": {"to": "int4", "group_size": 32, "zero_points": True},
    "int4, groups of 64, zero points": {"to": "int4", "group_size": 64, "zero_points": True},
    "int4, groups of 32, GPTQ": {"to": "int4", "group_size": 32, "method": "gptq"},
    "int4, groups of 64, GPTQ": {"to": "int4", "group_size": 64, "method": "gptq"},
    "int4, groups of 128, GPTQ": {"to": "int4", "group_size": 128, "method": "gptq"},
    "nf4": {"to": "nf4"},
    "bf16": {"to": "bf16"},
    "bf16, half pruned, magnitude": {"method": "magnitude"},
    "bf16, half pruned, Wanda": {"method": "wanda"},
    "bf16, 2:4, magnitude": {"method": "magnitude", "pattern": "2:4"},
    "bf16, 2:4, Wanda": {"method": "wanda", "pattern": "2:4"},
}


def works() -> list[str]:
    with gzip.open(data_file(AOZORA), "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def reported_texts() -> dict[str, str]:
    return {
        "wikitext-2 valid": data_file(WIKITEXT).read_text(encoding="utf-8"),
        "aozora": "\n\n".join(works()[::10]),
    }


def write_calibration(path: Path) -> None:
    """Text that no figure is reported on."""
    with data_file(C4).open(encoding="utf-8") as file:
        pages = "\n\n".join(json.loads(line)["text"] for line in file)
    others = "\n\n".join(text for n, text in enumerate(works()) if n % 10)
    english, japanese = CALIBRATION_CHARACTERS
    path.write_text(pages[:english] + "\n\n" + others[:japanese], encoding="utf-8")


def windows(tokenizer: Tokenizer, text: str, tokens: int) -> torch.Tensor:
    """The first `tokens` of a text (0: all), cut into windows that are read on their own."""
    ids = tokenizer.encode(text if tokens == 0 else text[: 12 * tokens])
    count = (min(len(ids), tokens) if tokens else len(ids)) // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


@torch.inference_mode()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    nats = 0.0
    for row in rows:
        logprobs = model(row[None, :-1])[0].float().log_softmax(-1)
        nats -= float(logprobs.gather(1, row[1:, None]).double().sum())
    return math.exp(nats / (rows.numel() - len(rows)))


def make(name: str, folder: Path, text: Path, samples: int) -> tuple[Path | str, dict[str, Any]]:
    """The folder of one variant, written if it is one, and what is known of it."""
    settings = VARIANTS[name]
    out = folder / slug(name)
    if settings is None:
        return MODEL, {}
    calibrated = settings.get("method") in ("gptq", "wanda")
    more: dict[str, Any] = {"calibrate": [text], "samples": samples} if calibrated else {}
    if settings.get("to") == "bf16":
        done: Any = convert(MODEL, "hf", out, dtype="bf16")
    elif "to" in settings:
        done = quantize(MODEL, out=out, **settings, **more)
    else:
        done = prune(MODEL, out, dtype="bf16", **settings, **more)
    return out, {"bytes": done.bytes}


def bits_of(model: Any) -> float:
    """Bits of a weight in the matrices of the blocks, with their share of scales."""
    parts = [layer.packed for name, layer in packed_layers(model) if "blocks." in name]
    if not parts:
        return 16.0
    return 8 * sum(p.nbytes for p in parts) / sum(p.out_features * p.in_features for p in parts)


def prepared(
    name: str, place: Path, texts: dict[str, str], tokens: int, samples: int
) -> tuple[Path | str, dict[str, Any]]:
    """A variant's folder and all of its figures but the speed; those in `place` are taken over."""
    done = place / f"{slug(name)}.json"
    settings = {"tokens": tokens, "samples": samples}
    if done.is_file():
        kept = json.loads(done.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return MODEL if VARIANTS[name] is None else place / slug(name), kept["result"]
    shutil.rmtree(place / slug(name), ignore_errors=True)  # of an interrupted run
    path, known = make(name, place, place / "calibration.txt", samples)
    model, tokenizer = llm.load(path, device="cpu")
    result = {"commit": commit(), "bits_per_weight": bits_of(model), **known}
    if VARIANTS[name] is None:
        result["bytes"] = gguf_bytes()
    for text, content in texts.items():
        rows = windows(tokenizer, content, tokens)
        result[f"perplexity, {text}"] = perplexity(model, rows)
        result[f"tokens, {text}"] = rows.numel()
    done.write_text(json.dumps({"settings": settings, "result": result}), encoding="utf-8")
    return path, result


def slug(name: str) -> str:
    """A variant's name as that of a folder."""
    return name.replace(" ", "_").replace(":", "of")


def main() -> None:
    made = parser(__doc__ or "", "quantization.json")
    made.add_argument("--tokens", type=int, default=65_536, help="of each text; 0: all of it")
    made.add_argument("--samples", type=int, default=128, help="windows of calibration")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--runs", type=int, default=5, help="of writing, for the speed")
    made.add_argument("--work", help="keep variants here, and go on with those that are there")
    made.add_argument("--only", nargs="*", default=[], help="variants whose names contain one")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    texts = reported_texts()
    results: dict[str, Any] = {}
    models: dict[str, Any] = {}
    tokenizer: Any = None
    with contextlib.ExitStack() as stack:
        place = Path(args.work or stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        write_calibration(place / "calibration.txt")
        for name in VARIANTS:
            if args.only and not any(part in name for part in args.only):
                continue
            path, results[name] = prepared(name, place, texts, args.tokens, args.samples)
            models[name], tokenizer = llm.load(path, device="cpu")
            print(name, results[name], flush=True)
    wait_for_quiet(args.force, patience_s=3600.0)  # the long part is over; only speed needs quiet
    for _ in range(args.runs):  # interleaved, so that what disturbs one disturbs all
        for name, model in models.items():
            written = complete(model, tokenizer, [PROMPT], max_new_tokens=NEW, temperature=0.0)
            rates = results[name].setdefault("tokens_per_second_runs", [])
            rates.append(written[0].tokens_per_second)
    for name in models:
        results[name]["tokens_per_second"] = median(results[name]["tokens_per_second_runs"])
        print(f"{name:50} {results[name]['tokens_per_second']:8.1f} tokens/s")
    settings = {
        "model": MODEL, "window": WINDOW, "threads": args.threads, "new_tokens": NEW,
        "calibration": {"samples": args.samples, "length": 512, "characters of C4 and Aozora":
                        CALIBRATION_CHARACTERS},
    }  # fmt: skip
    record(args.out, {"settings": settings, "variants": results}, [WIKITEXT, AOZORA, C4], ["torch"])


def gguf_bytes() -> int:
    from llm_from_scratch.weights.sources import locate

    return locate(MODEL).stat().st_size


if __name__ == "__main__":
    main()
