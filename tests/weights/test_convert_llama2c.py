"""examples/convert_llama2c.py: what llama2.c computes, the model folder computes, too."""

from __future__ import annotations

import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from llm_from_scratch.weights.folder import load_folder

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "convert_llama2c.py"
DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, SEQ = 24, 40, 2, 6, 3, 265, 16
HEAD = DIM // HEADS
# In the order of the file (llama2.c, `memory_map_weights`).
SHAPES = {
    "embedding": (VOCAB, DIM), "att_norm": (LAYERS, DIM), "q": (LAYERS, DIM, DIM),
    "k": (LAYERS, HEAD * KV_HEADS, DIM), "v": (LAYERS, HEAD * KV_HEADS, DIM),
    "o": (LAYERS, DIM, DIM), "ffn_norm": (LAYERS, DIM), "w1": (LAYERS, HIDDEN, DIM),
    "w2": (LAYERS, DIM, HIDDEN), "w3": (LAYERS, HIDDEN, DIM), "norm": (DIM,),
    "freq": (2, SEQ, HEAD // 2), "head": (VOCAB, DIM),
}  # fmt: skip


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(1)
    found = {name: torch.randn(shape) * 0.4 for name, shape in SHAPES.items()}
    for name in ("att_norm", "ffn_norm", "norm"):
        found[name] = found[name] + 1.2
    return found


def write(path: Path, weights: dict[str, Tensor], shared: bool) -> Path:
    vocab = VOCAB if shared else -VOCAB
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, vocab, SEQ)
    parts = [w.numpy().tobytes() for name, w in weights.items() if not shared or name != "head"]
    path.write_bytes(header + b"".join(parts))
    return path


def forward(weights: dict[str, Tensor], tokens: list[int], shared: bool) -> Tensor:
    """Logits (time, vocab) as run.c computes them: position by position, pairs of neighbours."""
    keys: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    values: list[list[Tensor]] = [[] for _ in range(LAYERS)]

    def turn(vector: Tensor, pos: int) -> Tensor:
        out = vector.clone()
        for i in range(0, len(vector), 2):
            angle = pos / 10000.0 ** ((i % HEAD) / HEAD)
            cos, sin = np.cos(angle), np.sin(angle)
            out[i] = vector[i] * cos - vector[i + 1] * sin
            out[i + 1] = vector[i] * sin + vector[i + 1] * cos
        return out

    logits = []
    for pos, token in enumerate(tokens):
        x = weights["embedding"][token]
        for layer in range(LAYERS):
            w = {name: weights[name][layer] for name in SHAPES if SHAPES[name][0] == LAYERS}
            h = rms_norm(x, (DIM,), w["att_norm"], eps=1e-5)
            q = turn(w["q"] @ h, pos)
            keys[layer].append(turn(w["k"] @ h, pos))
            values[layer].append(w["v"] @ h)
            outs = []
            for head in range(HEADS):
                group = slice(head // (HEADS // KV_HEADS) * HEAD, None)
                mine = q[head * HEAD :][:HEAD]
                k = torch.stack([key[group][:HEAD] for key in keys[layer]])
                v = torch.stack([value[group][:HEAD] for value in values[layer]])
                outs.append((k @ mine / HEAD**0.5).softmax(0) @ v)
            x = x + w["o"] @ torch.cat(outs)
            h = rms_norm(x, (DIM,), w["ffn_norm"], eps=1e-5)
            x = x + w["w2"] @ (silu(w["w1"] @ h) * (w["w3"] @ h))
        x = rms_norm(x, (DIM,), weights["norm"], eps=1e-5)
        logits.append(weights["embedding" if shared else "head"] @ x)
    return torch.stack(logits)


def tokenizer_bin(path: Path, bytes_as: str) -> Path:
    """Six merges after the 256 bytes, which older files write as characters."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(bytes_as.format(b, chr(b)) for b in range(256))]
    pieces += ["t", "h", "e", "th", "the", " "]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -9.0]
    data = b"".join(
        struct.pack("<fi", score, len(piece.encode())) + piece.encode()
        for piece, score in zip(pieces, scores, strict=True)
    )
    path.write_bytes(struct.pack("<i", 9) + data)
    return path


def convert(*words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_llama2c.py", *map(str, words)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_logits_equal_those_of_llama2c(
    shared: bool, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write(tmp_path / "model.bin", weights, shared)
    convert(checkpoint, "--out", tmp_path / "out", monkeypatch=monkeypatch)
    model, tokenizer = load_folder(tmp_path / "out")
    assert tokenizer is None
    tokens = [3, 200, 17, 0, 264, 5, 5, 81, 9]
    wanted = forward(weights, tokens, shared)
    torch.testing.assert_close(model(torch.tensor([tokens]))[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bytes_as", ["<0x{0:02X}>", "{1}"], ids=["newer", "older"])
def test_its_tokenizer(
    bytes_as: str, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write(tmp_path / "model.bin", weights, shared=True)
    words = tokenizer_bin(tmp_path / "tokenizer.bin", bytes_as)
    out = ("--tokenizer", words, "--out", tmp_path / "out")
    convert(checkpoint, *out, monkeypatch=monkeypatch)
    tokenizer = load_folder(tmp_path / "out")[1]
    assert tokenizer is not None
    ids = tokenizer.encode("the é")
    assert ids == [264, 263, 264, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(ids).strip() == "the é"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no checkpoint of llama2.c"),
        (b"GGUF" * 10, "bytes, but it has 40"),
        (struct.pack("<7i", 24, 40, 2, 6, 3, 265, 16), "bytes, but it has 28"),
        (struct.pack("<7i", *[2**31 - 1] * 7), "no checkpoint of llama2.c, or a truncated one"),
    ],
)
def test_another_file_is_refused(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(SystemExit):
        convert(tmp_path / "model.bin", "--out", tmp_path / "out", monkeypatch=monkeypatch)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
