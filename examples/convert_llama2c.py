"""Turn a checkpoint of llama2.c into a model folder, which every other command reads.

    python examples/convert_llama2c.py stories15M.bin --tokenizer tokenizer.bin --out runs/stories
    scratchlm generate runs/stories "Once upon a time"

A checkpoint (https://github.com/karpathy/llama2.c, the format without a version number) is seven
whole numbers and then every weight in fp32, matrix after matrix. Two things differ from a Hugging
Face folder: all layers of a kind lie together, and rotary positions turn neighbouring features
(0 and 1, 2 and 3, ...) where Hugging Face turns the first half against the second, so the rows of
Q and K change places.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import llm_from_scratch as llm
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.sentencepiece_spec import BYTE, CONTROL, NORMAL, UNKNOWN
from llm_from_scratch.text.sentencepiece_spec import sentencepiece_spec as spec_of_pieces
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.folder import load_folder

HEADER = struct.Struct("<7i")
BYTES = range(3, 259)  # the ids of the 256 bytes, after <unk>, <s> and </s>


@dataclass(frozen=True)
class Sizes:
    """The header. A negative vocab_size says that the output matrix has weights of its own."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Names (those of a Hugging Face folder; * stands for the layer) and shapes, in order."""
        layers, dim, hidden = self.n_layers, self.dim, self.hidden_dim
        head = dim // self.n_heads
        kv_dim, vocab = head * self.n_kv_heads, abs(self.vocab_size)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (vocab, dim),
            "model.layers.*.input_layernorm.weight": (layers, dim),
            "model.layers.*.self_attn.q_proj.weight": (layers, dim, dim),
            "model.layers.*.self_attn.k_proj.weight": (layers, kv_dim, dim),
            "model.layers.*.self_attn.v_proj.weight": (layers, kv_dim, dim),
            "model.layers.*.self_attn.o_proj.weight": (layers, dim, dim),
            "model.layers.*.post_attention_layernorm.weight": (layers, dim),
            "model.layers.*.mlp.gate_proj.weight": (layers, hidden, dim),
            "model.layers.*.mlp.down_proj.weight": (layers, dim, hidden),
            "model.layers.*.mlp.up_proj.weight": (layers, hidden, dim),
            "model.norm.weight": (dim,),
            "cosines and sines": (2, self.seq_len, head // 2),  # we compute them ourselves
        }
        if self.vocab_size < 0:
            shapes["lm_head.weight"] = (vocab, dim)
        return shapes

    def config_json(self) -> dict[str, object]:
        """What config.json says of such a model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.dim,
            "intermediate_size": self.hidden_dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "vocab_size": abs(self.vocab_size),
            "max_position_embeddings": self.seq_len,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": self.vocab_size > 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def read_checkpoint(path: Path) -> tuple[Sizes, dict[str, Tensor]]:
    """The header, and the weights by the names of a Hugging Face folder."""
    data = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0)
    header = HEADER.unpack(data[: HEADER.size].tobytes()) if len(data) >= HEADER.size else (0,) * 7
    sizes = Sizes(*header)
    likely = min(*header[:5], sizes.seq_len, abs(sizes.vocab_size)) > 0
    if not likely or sizes.dim % sizes.n_heads or sizes.n_heads % sizes.n_kv_heads:
        raise UserError(f"{path} is no checkpoint of llama2.c (its header is {header}).")
    shapes = sizes.matrices()
    wanted = HEADER.size + 4 * sum(np.prod(shape, dtype=object) for shape in shapes.values())
    if len(data) != wanted:
        raise UserError(
            f"{path} is no checkpoint of llama2.c, or a truncated one: its header means {wanted} "
            f"bytes, but it has {len(data)}."
        )
    values = torch.from_numpy(data[HEADER.size :].view("<f4").astype(np.float32))
    counts = [int(np.prod(shape)) for shape in shapes.values()]
    tensors = {}
    for (name, shape), part in zip(shapes.items(), values.split(counts), strict=True):
        whole = part.view(shape)
        if "*" in name:
            for layer, tensor in enumerate(whole):
                tensors[name.replace("*", str(layer))] = turned(name, tensor, sizes).clone()
        elif name.endswith(".weight"):
            tensors[name] = whole.clone()
    return sizes, tensors


def turned(name: str, tensor: Tensor, sizes: Sizes) -> Tensor:
    """The rows of Q and K: from neighbouring pairs to halves."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    pairs = sizes.dim // sizes.n_heads // 2
    return tensor.view(-1, pairs, 2, sizes.dim).transpose(1, 2).reshape(tensor.shape)


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """A tokenizer.bin of llama2.c, or whatever else `Tokenizer.load` reads."""
    if path.suffix != ".bin":
        return Tokenizer.load(path)
    data, place = path.read_bytes(), 4  # the length of the longest piece comes first
    pieces, scores = [], []
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, place)
            place += 8 + length
            scores.append(score)
            pieces.append(data[place - length : place].decode().replace(" ", "▁"))
    except (struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no tokenizer of llama2.c ({error}).") from error
    # Older and newer files write the special tokens and the bytes differently; their ids agree.
    pieces[: BYTES.stop] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (vocab_size - BYTES.stop)]
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return Tokenizer.from_spec(spec_of_pieces(pieces, scores, types, kind="bpe"), config)


def convert(checkpoint: Path, tokenizer: Path | None, out: Path) -> None:
    """Write the model folder `out`; without a tokenizer it holds the weights alone."""
    sizes, tensors = read_checkpoint(checkpoint)
    words = None if tokenizer is None else read_tokenizer(tokenizer, abs(sizes.vocab_size))
    with tempfile.TemporaryDirectory() as name:
        save_file(tensors, Path(name, "model.safetensors"))
        Path(name, "config.json").write_text(json.dumps(sizes.config_json()), encoding="utf-8")
        model, _ = load_folder(name)
        llm.save(model, words, out)
    print(f"Saved {out}: {sum(p.numel() for p in model.parameters()):,} parameters")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Turn a llama2.c checkpoint into a model folder.")
    parser.add_argument("checkpoint", type=Path, help="such as stories15M.bin")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer.bin, or a tokenizer's folder")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    given = parser.parse_args()
    try:
        convert(given.checkpoint, given.tokenizer, given.out)
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
