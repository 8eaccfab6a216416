"""T5 and Flan-T5 (arXiv:1910.10683, 2210.11416): a learned bias per distance, unscaled scores."""

from llm_from_scratch.weights.families.pairs import GatedActivation, T5Head
from llm_from_scratch.weights.families.settings import Heads, Setting, dropout, number, of, size
from llm_from_scratch.weights.families.table import PAIR, Family, Rule, named, pair_heads, rules

SETTINGS = (
    size("vocab_size", "vocab_size", 32128),
    size("d_model", "d_model", 512, "hidden_size"),
    Heads("d_model", "num_heads", 8, None, dim="d_kv", dim_default=64, even=False,
          aliases=("num_attention_heads",)),
    size("d_ff", "d_ff", 2048),
    *of("encoder", size("num_layers", "n_layers", 6, "num_hidden_layers")),
    *of("decoder", Setting("num_decoder_layers", "n_layers", None, like="num_layers")),
    size("relative_attention_num_buckets", "relative_buckets", 32),
    size("relative_attention_max_distance", "relative_distance", 128),
    number("layer_norm_epsilon", "norm_eps", 1e-6),
    dropout("dropout_rate", 0.1),
    *of("pair", Setting("decoder_start_token_id", "start_id", 0, "token_id"),
        Setting("forced_bos_token_id", "first_id", None, "maybe_token_id"),
        Setting("forced_eos_token_id", "end_id", None, "maybe_token_id")),
)  # fmt: skip


def stack(side: str, last: int) -> tuple[Rule, ...]:
    """A stack's tensors; `last` is the number of the feed-forward in its blocks."""
    here = (f"{side}.block.{{}}.layer.", f"{side}.blocks.{{}}.")
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias"
    dense = f"{last}.DenseReluDense.w"
    return (
        *rules(f"{side}.", f"{side}.", {"final_layer_norm": "final_norm", bias: "relative_bias"}),
        *rules(*here, {"0.layer_norm": "attention_norm", "1.layer_norm": "cross_norm"}),
        *rules(*here, {f"0.SelfAttention.{x}": f"attention.{x}" for x in "qkvo"}),
        *rules(*here, {f"1.EncDecAttention.{x}": f"cross.{x}" for x in "qkvo"}),
        *rules(*here, {f"{last}.layer_norm": "feed_forward_norm"}),
        *rules(*here, {f"{dense}o": "feed_forward.down", f"{dense}i_0": "feed_forward.gate"}),
        *rules(*here, {f"{dense}i_1": "feed_forward.up"}, beside="feed_forward.gate"),
        *rules(*here, {f"{dense}i": "feed_forward.up"}),
    )  # fmt: skip


T5 = Family(
    name="t5",
    title="T5, Flan-T5",
    kind="encoder-decoder",
    prefix="",
    classes=named("T5", *PAIR, lm="T5ForConditionalGeneration", encoder="T5EncoderModel"),
    # Distances have no end, but at this length the table of their biases takes gigabytes.
    constants={"position": "none", "attention_width": 1.0, "max_seq_len": 16384},
    settings=(*SETTINGS, GatedActivation("relu"), T5Head()),
    tensors=(*rules("", "", {"shared": "encoder.embedding", "lm_head": "decoder.head"}),
             *stack("encoder", 1), *stack("decoder", 2)),
    unused={"n_positions": "the length in training; there is no limit",
            "initializer_factor": "how fresh weights are drawn"},
    copies={f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")},
    tied_as_stored=True,
    heads=pair_heads("transformer."),
    surplus=(".EncDecAttention.relative_attention_bias.weight",),
)  # fmt: skip
