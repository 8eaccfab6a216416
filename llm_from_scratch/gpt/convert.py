"""From the GPT that is read to the decoder that the rest of the project runs, saves and serves."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_from_scratch.gpt.model import GPT
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder


def decoder_config(gpt: GPT) -> ModelConfig:
    """What a GPT is in the decoder's terms: GPT-2 with the exact GELU and a head of its own."""
    sizes = gpt.sizes
    n_embd, n_head = int(sizes["n_embd"]), int(sizes["n_head"])
    return ModelConfig(
        vocab_size=int(sizes["vocab_size"]),
        d_model=n_embd,
        n_layers=int(sizes["n_layer"]),
        n_heads=n_head,
        n_kv_heads=n_head,
        head_dim=n_embd // n_head,
        d_ff=4 * n_embd,
        max_seq_len=int(sizes["block_size"]),
        family="gpt2",
        norm="layer",
        norm_eps=gpt.ln_f.eps,
        position="learned",
        attention_bias=True,
        output_bias=True,
        activation="gelu",
        gated=False,
        feed_forward_bias=True,
        tie_embeddings=False,
        dropout=float(sizes["dropout"]),
    )


def decoder_weights(gpt: GPT) -> dict[str, Tensor]:
    """A GPT's weights under the decoder's names; the heads' matrices are stacked into one."""
    theirs = gpt.state_dict()
    ours = {
        "embedding.weight": theirs["token_embedding.weight"],
        "positions.weight": theirs["position_embedding.weight"],
        "final_norm.weight": theirs["ln_f.weight"],
        "final_norm.bias": theirs["ln_f.bias"],
        "head.weight": theirs["head.weight"],
    }
    for i in range(int(gpt.sizes["n_layer"])):
        here = f"blocks.{i}."
        for kind in ("weight", "bias"):
            for part in "qkv":
                heads = [
                    theirs[f"{here}attn.attention.heads.{h}.linear_{part}.{kind}"]
                    for h in range(int(gpt.sizes["n_head"]))
                ]
                ours[f"{here}attention.{part}.{kind}"] = torch.cat(heads)
            for our_name, their_name in (
                ("attention_norm", "ln_1"),
                ("attention.o", "attn.attention.linear_o"),
                ("feed_forward_norm", "ln_2"),
                ("feed_forward.up", "mlp.0"),
                ("feed_forward.down", "mlp.2"),
            ):
                ours[f"{here}{our_name}.{kind}"] = theirs[f"{here}{their_name}.{kind}"]
    return ours


def to_decoder(gpt: GPT) -> Decoder:
    """A `Decoder` with a copy of the GPT's weights and the same logits, in inference mode.

    It is what `weights.folder.save_folder`, the key-value cache and `scratchlm` commands take. (In
    training it also drops attention weights, which the GPT does not.)
    """
    weights = decoder_weights(gpt)
    decoder = Decoder(decoder_config(gpt)).to(weights["head.weight"])
    decoder.load_state_dict(weights)
    return decoder.eval()
