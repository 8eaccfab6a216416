"""Writes the figures of benchmarks/results/*.json into the pages, between their markers.

A place is `<!-- figures:NAME -->`; everything up to the next `<!-- /figures -->` is replaced. With
`--check` nothing is written, and a page that does not show the committed figures is an error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"<!-- figures:(\w+) -->(?:.*?<!-- /figures -->)?", re.S)
Row = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def machine(data: Row, ja: bool) -> str:
    e = data["environment"]
    made = data["commit"][:10]
    script = data["command"].split()[1].rpartition("/")[2]
    again = " ".join(["python", f"benchmarks/{script}", *data["command"].split()[2:]])
    torch = e["versions"]["torch"]
    where = f"{e['processor']}, {e['cores']} cores, Python {e['python']}, torch {torch}"
    if ja:
        return f"測定環境: {where}。コミット `{made}`、{data['date']}。再測定: `{again}`"
    return f"Measured on {where}; commit `{made}`, {data['date']}. Again: `{again}`"


def quickstart(data: Row, ja: bool) -> str:
    row = data["results"]["runs"][0]
    names = {
        "bits_per_byte": "このモデル" if ja else "this model",
        "gzip_bits_per_byte": "gzip -9",
        "bz2_bits_per_byte": "bz2 -9",
        "xz_bits_per_byte": "xz -9e",
        "xz_primed_bits_per_byte": "xz -9e（学習テキストを先に読ませた場合）"
        if ja
        else "xz -9e, primed with the training text",
    }
    head = ["取り分けたテキスト", "ビット／バイト"] if ja else ["held-out text", "bits per byte"]
    rows = [[text, f"{row[name]:.3f}"] for name, text in names.items()]
    size, steps, wall = row["parameters"] / 1e6, row["steps"], row["wall_seconds"]
    tokens, speed = row["tokens"] / 1e6, row["tokens_per_second"]
    if ja:
        text = (
            f"{size:.2f} M パラメータ、{steps:,} ステップ、{tokens:.2f} M トークン、"
            f"{speed:,.0f} トークン／秒（MFU {row['mfu']:.0%}）。コマンド全体で {wall:.0f} 秒。"
        )
    else:
        text = (
            f"{size:.2f} M parameters, {steps:,} steps, {tokens:.2f} M tokens, {speed:,.0f} "
            f"tokens/s (MFU {row['mfu']:.0%}); {wall:.0f} s for the whole command."
        )
    return f"{table(head, rows)}\n\n{text}\n{machine(data, ja)}"


def train_speed(data: Row, ja: bool) -> str:
    head = (
        [
            "パラメータ",
            "スレッド",
            "transformers fp32",
            "本プロジェクト fp32",
            "本プロジェクト bf16",
        ]
        if ja
        else ["parameters", "threads", "transformers fp32", "ours fp32", "ours bf16"]
    )
    rows = []
    for r in data["results"]["speed"]:
        cells = [f"{r['parameters'] / 1e6:.2f} M", str(r["threads"])]
        for name in ("transformers fp32", "ours fp32", "ours bf16"):
            cells.append(f"{r['tokens_per_second'][name]:,.0f} ({r['ratio'][name]:.2f}x)")
        rows.append(cells)
    lines = [table(head, rows), ""]
    after = json.loads((RESULTS / "train_loss.json").read_text(encoding="utf-8"))["results"]
    for r in after["loss_after_200"]:
        values = ", ".join(f"{n} {v:.4f}" for n, v in r["loss"].items())
        lines.append(
            f"{r['size']}: 同じ {r['steps']} バッチの後の損失は {values}。"
            if ja
            else f"{r['size']}: loss after {r['steps']} equal batches: {values}."
        )
    peer = f"transformers {data['peers']['transformers']}"
    note = (
        f"比較相手: {peer}、バッチは 8×256 と 12×64。"
        if ja
        else f"Peer: {peer}; batches of 8x256 and 12x64."
    )
    return "\n".join([*lines, "", f"{note} {machine(data, ja)}"])


def tinyshakespeare(data: Row, ja: bool) -> str:
    runs = data["results"]["runs"]
    head = (
        ["シード", "損失（末尾 10 %）", "transformers で計算", "パラメータ"]
        if ja
        else ["seed", "loss on the last 10 %", "by transformers", "parameters"]
    )
    rows = [
        [
            str(r["seed"]), f"{r['val_loss']:.4f}", f"{r['val_loss_by_transformers']:.4f}",
            f"{r['parameters']:,}",
        ]
        for r in runs
    ]  # fmt: skip
    mean = data["results"]["mean_val_loss"]
    text = f"Mean of {len(runs)} seeds: **{mean:.4f}** nats per character (nanoGPT on CPU: 1.88)."
    if ja:
        text = f"{len(runs)} シードの平均は **{mean:.4f}** nats／文字です"
        text += "（nanoGPT の CPU 用設定は 1.88）。"
    return f"{table(head, rows)}\n\n{text}\n{machine(data, ja)}"


def bpe(data: Row, ja: bool) -> str:
    head = (
        ["コーパス", "本実装（秒）", "tokenizers（秒）", "比"]
        if ja
        else ["corpus", "ours, s", "tokenizers, s", "ratio"]
    )
    rows = []
    for name, r in data["results"]["corpora"].items():
        ours, theirs = r["median_seconds"]["ours"], r["median_seconds"]["tokenizers"]
        rows.append([name, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}x"])
    return f"{table(head, rows)}\n\n{machine(data, ja)}"


def unigram(data: Row, ja: bool) -> str:
    found = data["results"]
    head = (
        ["トレーナー", "秒", "取り分けた文章のバイト／トークン", "比"]
        if ja
        else ["trainer", "s", "bytes per token, held out", "ratio"]
    )
    names = {
        "sentencepiece": f"sentencepiece {data['peers']['sentencepiece']}",
        "ours": "本実装" if ja else "ours",
        "ours, their cuts": "本実装、sentencepiece と同じ区切り"
        if ja
        else "ours, words cut as sentencepiece does",
    }
    rows = [
        [
            text, f"{found['median_seconds'][who]:.1f}", f"{found['bytes_per_token'][who]:.3f}",
            f"{found['bytes_per_token_over_sentencepiece'][who]:.3f}",
        ]
        for who, text in names.items()
    ]  # fmt: skip
    threads = found["sentencepiece_threads"]
    text = (
        f"{found['vocab_size']:,} 項目。sentencepiece は {threads} スレッド、本実装は 1 スレッド。"
        if ja
        else f"{found['vocab_size']:,} entries; sentencepiece on {threads} threads, ours on one."
    )
    return f"{table(head, rows)}\n\n{text}\n{machine(data, ja)}"


def first_token(data: Row, ja: bool) -> str:
    head = (
        ["スレッド", "最初のトークンまで（秒）"] if ja else ["threads", "command to first token, s"]
    )
    cold = "2（カーネルの初回コンパイルを含む）" if ja else "2, kernels still to be compiled"
    rows = [[cold if t == "cold" else t, f"{s:.2f}"] for t, s in data["results"]["seconds"].items()]
    answer = data["results"]["answer"].strip()
    said = f"答え: 「{answer}」" if ja else f'It answers: "{answer}"'
    return f"{table(head, rows)}\n\n{said}\n{machine(data, ja)}"


def inference(data: Row, ja: bool) -> str:
    found = data["results"]
    peers = ("ours", "llama.cpp", "transformers")
    tasks = {
        "decode": ("1 件の生成", "decode, one text"),
        "prefill": (f"プロンプト {found['prefill']} トークンの読み込み",
                    f"prefill of {found['prefill']}"),
        "together": (f"{found['together']} 件の同時生成", f"decode, {found['together']} at once"),
    }  # fmt: skip
    mine = "本プロジェクト 4 ビット" if ja else "ours, 4 bits"
    head = ["トークン／秒", "スレッド"] if ja else ["tokens/s", "threads"]
    head += [mine, "llama.cpp Q4_1", "transformers bf16", "目標の比" if ja else "ratio aimed at"]
    aims = {"decode": ("llama.cpp", 1.2), "prefill": ("transformers", 1.0),
            "together": ("llama.cpp", 1.5)}  # fmt: skip
    rows = []
    for task, names in tasks.items():
        for threads, r in found["speed"].items():
            speeds = r["median"][task]
            peer, least = aims[task]
            found_ratio = r["ratios"][f"{task}_to_{peer.replace('.', '_')}"]
            ratio = f"{found_ratio:.2f}x {peer} (>= {least})"
            cells = [f"{speeds[name]:,.0f}" for name in peers]
            rows.append([names[0] if ja else names[1], threads, *cells, ratio])
    memory = {name: value / 1e6 for name, value in found["memory"]["median"].items()}
    ratio = found["memory"]["ratio_to_llama_cpp"]
    us = "本プロジェクト" if ja else "ours"
    said = ", ".join(f"{us if n == 'ours' else n} {v:,.0f} MB" for n, v in memory.items())
    mbu = ", ".join(f"{share:.0%}" for share in found["mbu"].values())
    versions = ", ".join(f"{name} {version}" for name, version in data["peers"].items())
    if ja:
        text = (
            f"メモリの最大値（ライブラリの読み込み後からの増加）: {said}。"
            f"llama.cpp の {ratio:.2f} 倍です。"
            f"1 件の生成での MBU（1、2 スレッド）: {mbu}。比較相手: {versions}。"
        )
    else:
        text = (
            f"Peak memory above the imported libraries: {said}; {ratio:.2f} times llama.cpp's. MBU "
            f"of one text (1 and 2 threads): {mbu}. Peers: {versions}."
        )
    return f"{table(head, rows)}\n\n{text}\n{machine(data, ja)}"


def quantization(data: Row, ja: bool) -> str:
    found, settings = data["results"]["variants"], data["results"]["settings"]
    texts = [key for key in next(iter(found.values())) if key.startswith("perplexity, ")]
    names = [text.removeprefix("perplexity, ") for text in texts]
    if ja:
        head = ["方法", "ビット／重み", "MB", "トークン／秒", *(f"{name} の PPL" for name in names)]
    else:
        head = ["method", "bits/weight", "MB", "tokens/s", *(f"perplexity, {n}" for n in names)]
    rows = [
        [
            name, f"{r['bits_per_weight']:.2f}", f"{r['bytes'] / 1e6:.0f}",
            f"{r['tokens_per_second']:.0f}", *(f"{r[text]:.2f}" for text in texts),
        ]
        for name, r in found.items()
    ]  # fmt: skip
    first = next(iter(found.values()))
    counts = ", ".join(f"{name} {first[f'tokens, {name}']:,}" for name in names)
    if ja:
        text = f"読んだトークン数: {counts}。スレッド数: {settings['threads']}。"
    else:
        text = f"Tokens read: {counts}. Threads: {settings['threads']}."
    return f"{table(head, rows)}\n\n{text}\n{machine(data, ja)}"


def agreement(data: Row, ja: bool) -> str:
    found = data["results"]["agreement"]
    head = (
        ["重みとキャッシュ", "平均 KL（nats）", "最有力トークンの一致"]
        if ja
        else ["weights and cache", "mean KL, nats", "same likeliest token"]
    )
    rows = [
        [name, f"{r['mean_kl']:.1e}", f"{r['top1_agreement']:.1%}"]
        for name, r in found["formats"].items()
    ]
    text = (
        f"WikiText-2 検証データの {found['tokens']:,} トークン。比べる相手は、同じ重みを fp32 に"
        "広げて PyTorch で計算したもの。"
        if ja
        else f"{found['tokens']:,} tokens of WikiText-2 valid, beside the same weights as fp32 "
        "numbers in PyTorch."
    )
    return f"{table(head, rows)}\n\n{text}\n{machine(data, ja)}"


def gguf_parity(data: Row, ja: bool) -> str:
    found = data["results"]
    head = (
        ["形式", "バイト", "最有力トークンの一致", "KL（nats）", "fp32 との KL（nats）"]
        if ja
        else ["kind", "bytes", "same likeliest token", "KL, nats", "KL to fp32, nats"]
    )
    rows = [
        [
            kind, f"{r['bytes']:,}", f"{r['top1_agreement']:.1%}", f"{r['mean_kl']:.1e}",
            f"{r['mean_kl_to_fp32']:.1e}",
        ]
        for kind, r in found["formats"].items()
    ]  # fmt: skip
    same = sum(r["theirs"] == r["ours"] for r in found["greedy"])
    tokens, peer = len(found["greedy"][0]["ours"]), data["peers"]["llama_cpp_python"]
    if ja:
        text = (
            f"貪欲な {tokens} トークン（F32）: {len(found['greedy'])} 個のプロンプトのうち {same} "
            f"個で一致。比較相手: llama-cpp-python {peer}。最後の列は、同じファイルを読んだ "
            "llama.cpp と、書き出す前の fp32 のモデルとの差。"
        )
    else:
        text = (
            f"{tokens} greedy tokens (F32): the same after {same} of {len(found['greedy'])} "
            f"prompts. Peer: llama-cpp-python {peer}. The last column is how far llama.cpp on the "
            "file is from the model in fp32 before it was written."
        )
    return f"{table(head, rows)}\n\n{text}\n{machine(data, ja)}"


EXPERT_CASES = {
    "one token": "1 トークン",
    "eight tokens": "8 トークン",
    "reading 512 tokens": "512 トークンの読み取り",
    "training step, 8 experts": "学習の一ステップ、エキスパート 8 個",
    "training step, 64 experts": "学習の一ステップ、エキスパート 64 個",
}


def experts(data: Row, ja: bool) -> str:
    peers = ("eager", "batched_mm", "grouped_mm")
    head = ["場合", "本プロジェクト（ms）"] if ja else ["case", "ours, ms"]
    head += [f"transformers {peer}{'（ms）' if ja else ', ms'}" for peer in peers]
    head.append("最良の相手との比" if ja else "ours / best peer")
    rows = []
    for name, r in data["results"]["layers"].items():
        medians = r["median_seconds"]
        times = [medians.get(kind) for kind in ("ours", *(f"transformers {p}" for p in peers))]
        cells = ["-" if t is None else f"{1e3 * t:.2f}" for t in times]
        rows.append(
            [EXPERT_CASES[name] if ja else name, *cells, f"{r['ours_over_best_peer']:.2f}x"]
        )
    return f"{table(head, rows)}\n\n{machine(data, ja)}"


def figure_text(name: str, values: list[float]) -> str:
    """The mean of a figure over the seeds, with the least and the greatest where there are more."""
    share = any(part in name for part in ("accuracy", "f1", "precision", "recall", "mcc"))
    share = share and max(values) <= 1

    def one(value: float) -> str:
        return f"{value:.2%}".replace("%", " %") if share else f"{value:.4f}"

    mean = one(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({one(min(values))} … {one(max(values))})"


def finetune(data: Row, ja: bool) -> str:
    """What was reached, and below it what it took: rows, time, memory."""
    found = data["results"]
    reached, took = [], []
    for name, task in found["tasks"].items():
        runs = [run for run in found["runs"] if run["task"] == name]
        if not runs:
            continue
        for number, figure in enumerate(task["figures"]):
            values = [run["summary"][figure] for run in runs]
            base = [run["summary"].get(f"base_{figure}") for run in runs]
            aim = "" if task["target"] is None else f"≥ {figure_text(figure, [task['target']])}"
            model = f"{task['method']}, {task['after'] or task['model']}"
            cells = [f"`{figure}`", "-" if None in base else figure_text(figure, base)]
            cells.append(f"**{figure_text(figure, values)}**")
            first = number == 0
            reached.append(
                [f"{name} ({model})" if first else "", *cells, aim if first else "",
                 task["published"] if first else ""]
            )  # fmt: skip
        counts, summary = found["data"][task["data"]], runs[0]["summary"]
        took.append([
            name, *(f"{summary[f'{part}_rows']:,}" for part in ("train", "val", "test")),
            f"{counts.get('exact_duplicates', 0):,} / {counts.get('near_duplicates', 0):,}",
            f"{summary['avoided_exact'] + summary['avoided_near']:,}",
            f"{max(run['wall_seconds'] for run in runs):.0f} s",
            f"{max(run['peak_bytes'] for run in runs) / 1e9:.1f} GB",
        ])  # fmt: skip
    heads = (
        (["課題（手法、モデル）", "数値", "学習前", "学習後", "目標", "公表値"],
         ["課題", "学習行", "検証行", "評価行", "重複（完全／類似）", "他課題の評価に似た行",
          "時間", "メモリ"])
        if ja
        else (["task (method, model)", "figure", "before", "after", "target", "published"],
              ["task", "rows learnt", "to choose on", "measured", "duplicates, exact / near",
               "like another test", "time", "memory"])
    )  # fmt: skip
    notes = (
        (
            "数値は各実行の `summary.json` のものです。複数のシードでは平均を、括弧に最小と最大を"
            "示します。",
            "完全な重複と類似した重複は、データを分ける前に除きました。ほかの課題の評価データに似た行は、"
            "学習データから除きました。時間とメモリは、コマンド全体の最大値です。",
        )
        if ja
        else (
            "Figures are those of each run's `summary.json`; of several seeds the mean, with the "
            "least and the greatest.",
            "Exact and near duplicates left before the rows were divided; rows like those of "
            "another task's test are not learnt from. Time and memory are the most that a whole "
            "command took.",
        )
    )
    parts = [table(heads[0], reached), notes[0], table(heads[1], took), notes[1]]
    return "\n\n".join(parts) + f" {machine(data, ja)}"


def arithmetic(data: Row, ja: bool) -> str:
    head = ["seed", "start, greedy", "drawn", "right once in 8", "after GRPO, greedy", "minutes"]
    if ja:
        head = ["シード", "開始時（貪欲）", "抽選", "8 回に一度は正解", "GRPO 後（貪欲）", "分"]
    rows = []
    for run in data["results"]["runs"]:
        start = [f"{run['before'][n]:.1%}" for n in ("greedy", "drawn", "right_once_in_8")]
        after, minutes = run["after"]["greedy"], run["wall_seconds"] / 60
        rows.append([str(run["seed"]), *start, f"**{after:.1%}**", f"{minutes:.1f}"])
    return f"{table(head, rows)}\n\n{machine(data, ja)}"


def sft_speed(data: Row, ja: bool) -> str:
    found = data["results"]
    rates, peaks = found["tokens_per_second"], found["peak_gb"]
    kinds = {
        "full": ("全パラメータ", "full"),
        "full, recomputing": ("全パラメータ、再計算", "full, recomputing"),
        "lora": ("LoRA", "LoRA"),
        "lora, recomputing": ("LoRA、再計算", "LoRA, recomputing"),
    }
    head = ["", "TRL", "this project", "speed", "TRL, peak", "this project, peak", "memory"]
    if ja:
        head = ["", "TRL", "本プロジェクト", "速さ", "TRL の最大", "こちらの最大", "メモリ"]
    second = "トークン／秒" if ja else "tokens/s"
    rows = []
    for kind, names in kinds.items():
        ours, theirs = f"ours {kind}", f"trl {kind}"
        if ours not in rates or theirs not in rates:
            continue
        rows.append([
            names[0 if ja else 1], f"{rates[theirs]:,.0f} {second}", f"{rates[ours]:,.0f} {second}",
            f"**{rates[ours] / rates[theirs]:.2f}x**", f"{peaks[theirs]:.2f} GB",
            f"{peaks[ours]:.2f} GB", f"**{peaks[ours] / peaks[theirs]:.2f}x**",
        ])  # fmt: skip
    peers = ", ".join(f"{name} {data['peers'][name]}" for name in ("trl", "peft", "transformers"))
    note = (
        f"{found['model']}、バッチは {found['batch']} 会話、bf16、LoRA のランクは {found['rank']}。"
        f"比較相手: {peers}。"
        if ja
        else f"{found['model']}, batches of {found['batch']} conversations, bf16, LoRA of rank "
        f"{found['rank']}. Peers: {peers}."
    )
    return f"{table(head, rows)}\n\n{note} {machine(data, ja)}"


MAKERS: dict[str, tuple[str, Callable[[Row, bool], str]]] = {
    "quickstart": ("quickstart", quickstart),
    "train_speed": ("train_speed", train_speed),
    "tinyshakespeare": ("tinyshakespeare", tinyshakespeare),
    "bpe": ("bpe_training", bpe),
    "unigram": ("unigram_training", unigram),
    "first_token": ("first_token", first_token),
    "inference": ("inference", inference),
    "agreement": ("inference", agreement),
    "quantization": ("quantization", quantization),
    "gguf_parity": ("gguf_parity", gguf_parity),
    "experts": ("experts", experts),
    "arithmetic": ("arithmetic", arithmetic),
    "finetune": ("finetune", finetune),
    "sft_speed": ("sft_speed", sft_speed),
}


def filled(text: str, ja: bool) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match[1]
        file, make = MAKERS[name]
        path = RESULTS / f"{file}.json"
        if not path.is_file():
            return match[0]
        body = make(json.loads(path.read_text(encoding="utf-8")), ja)
        return f"<!-- figures:{name} -->\n{body}\n<!-- /figures -->"

    return PLACE.sub(replace, text)


def main() -> None:
    check, wrong = "--check" in sys.argv, []
    pages = [ROOT / "README.md", ROOT / "README.ja.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        old = page.read_text(encoding="utf-8")
        new = filled(old, page.name == "README.ja.md" or page.parent.name == "ja")
        if new != old:
            wrong.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    if check and wrong:
        sys.exit(f"These pages do not show the committed figures: {', '.join(wrong)}.")
    print(f"{len(wrong)} pages {'differ' if check else 'written'}")


if __name__ == "__main__":
    main()
