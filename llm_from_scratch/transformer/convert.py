"""From the Transformer that is read to the encoder-decoder that the project runs and saves.

Both are the paper's (arXiv:1706.03762), and so is Marian, as which it is saved. They differ in
three things:

- The paper's positions take turns, sine, cosine, sine, ...; Marian has all sines first. Which
  feature has which number means nothing, so every matrix is renumbered along with the positions.
- Here every head has small matrices of its own; there those of all heads are stacked into one.
- Here a layer norm divides by std + 1e-6, there by sqrt(variance + 1e-5). What comes out of it is
  smaller by at most a share of 5e-6 / variance. Behind a norm the variance is about 1 again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.transformer.attention import AttentionHead
from llm_from_scratch.transformer.transformer import EncoderBlock, Transformer

# By stack: its attentions and norms, the name here -> the name there.
PARTS = {
    "encoder": (
        {"attention": "attention"},
        {"layer_norm1": "attention_norm", "layer_norm2": "feed_forward_norm"},
    ),
    "decoder": (
        {"attention": "attention", "attention_source_target": "cross"},
        {
            "layer_norm1": "attention_norm",
            "layer_norm2": "cross_norm",
            "layer_norm3": "feed_forward_norm",
        },
    ),
}


def encoder_decoder_config(
    model: Transformer, start_id: int, end_id: int | None = None
) -> EncoderDecoderConfig:
    """What a Transformer is in the encoder-decoder's terms: see `to_encoder_decoder`."""
    if not len(model.encoder.blocks):
        raise UserError("The Transformer has no blocks, so there is nothing to carry over.")
    block = model.encoder.blocks[0]
    assert isinstance(block, EncoderBlock)
    head = block.attention.heads[0]
    assert isinstance(head, AttentionHead)
    d_model, n_heads = model.linear.in_features, len(block.attention.heads)
    d_k, d_v = head.linear_k.out_features, head.linear_v.out_features
    d_ff = len(model.state_dict()["encoder.blocks.0.feed_forward.0.bias"])
    if not d_k == d_v == d_model / n_heads:
        raise UserError(
            f"d_k is {d_k}, d_v {d_v} and d_model / n_heads {d_model / n_heads:g}, but Marian, as "
            "which a Transformer is saved, has one number for all three; make them equal."
        )

    def stack(vocab_size: int, decoder: bool) -> ModelConfig:
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            n_layers=len(model.encoder.blocks),
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=d_k,
            d_ff=d_ff,
            max_seq_len=model.max_sequence_len,
            family="marian",
            norm="layer",
            residual="post",
            final_norm=False,
            position="sinusoidal",
            causal=decoder,
            cross_attention=decoder,
            attention_bias=True,
            output_bias=True,
            activation="relu",
            gated=False,
            feed_forward_bias=True,
            scale_embedding=True,
            tie_embeddings=not decoder,
        )

    return EncoderDecoderConfig(
        encoder=stack(model.encoder.embedding.num_embeddings, decoder=False),
        decoder=stack(model.decoder.embedding.num_embeddings, decoder=True),
        start_id=start_id,
        end_id=end_id,
        writes_start=False,
        share_embeddings=False,
        logits_bias=True,
    )


def encoder_decoder_weights(model: Transformer, n_heads: int) -> dict[str, Tensor]:
    """A Transformer's weights under the encoder-decoder's names, features renumbered."""
    theirs = model.state_dict()
    m = model.linear.in_features
    order = torch.cat([torch.arange(0, m, 2), torch.arange(1, m, 2)])  # sines first

    def reading(name: str) -> Tensor:
        """A matrix that takes in the model's features."""
        return theirs[name][:, order]

    def writing(name: str) -> Tensor:
        """A matrix or vector that gives out the model's features."""
        return theirs[name][order]

    ours = {"decoder.head.weight": reading("linear.weight")}
    ours["logits_bias"] = torch.zeros(len(ours["decoder.head.weight"]))
    for side, (attentions, norms) in PARTS.items():
        ours[f"{side}.embedding.weight"] = reading(f"{side}.embedding.weight")
        for i in range(len(model.encoder.blocks)):
            here = f"{side}.blocks.{i}."
            for name, our_name in attentions.items():
                attention = f"{here}{name}."
                for part in "qkv":
                    heads = [f"{attention}heads.{h}.linear_{part}." for h in range(n_heads)]
                    matrices = [reading(f"{head}weight") for head in heads]
                    biases = [theirs[f"{head}bias"] for head in heads]
                    ours[f"{here}{our_name}.{part}.weight"] = torch.cat(matrices)
                    ours[f"{here}{our_name}.{part}.bias"] = torch.cat(biases)
                for kind in ("weight", "bias"):
                    ours[f"{here}{our_name}.o.{kind}"] = writing(f"{attention}linear_o.{kind}")
            for name, our_name in norms.items():
                ours[f"{here}{our_name}.weight"] = writing(f"{here}{name}.gamma")
                ours[f"{here}{our_name}.bias"] = writing(f"{here}{name}.beta")
            up, down = f"{here}feed_forward.0.", f"{here}feed_forward.2."
            ours[f"{here}feed_forward.up.weight"] = reading(f"{up}weight")
            ours[f"{here}feed_forward.up.bias"] = theirs[f"{up}bias"]
            for kind in ("weight", "bias"):
                ours[f"{here}feed_forward.down.{kind}"] = writing(f"{down}{kind}")
    return ours


def to_encoder_decoder(
    model: Transformer, start_id: int, end_id: int | None = None
) -> EncoderDecoder:
    """An `EncoderDecoder` with a copy of the Transformer's weights, in inference mode.

    It is what `weights.folder.save_folder` writes as a Marian model, and what `llm.generate` takes.
    `start_id` is the `bos_token` of `Transformer.inference`; it is never written again. `end_id` is
    what a target of the greatest length is made to end with, None nothing. Logits are equal but for
    the last digits (see above).

    Raises `UserError` unless d_k = d_v = d_model / n_heads, as the paper has it.
    """
    config = encoder_decoder_config(model, start_id, end_id)
    weights = encoder_decoder_weights(model, config.decoder.n_heads)
    ours = EncoderDecoder(config).to(weights["decoder.head.weight"])
    ours.load_state_dict(weights)
    return ours.eval()
