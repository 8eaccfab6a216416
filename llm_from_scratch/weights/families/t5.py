"""T5 and Flan-T5 (arXiv:1910.10683, 2210.11416): learned biases per distance, nothing scaled."""

from llm_from_scratch.weights.families.pairs import GatedActivation, T5Head
from llm_from_scratch.weights.families.settings import Heads, Setting, dropout, number, of, size
from llm_from_scratch.weights.families.table import Family, rules

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
    *of("pair", Setting("decoder_start_token_id", "start_id", 0, "token_id")),
)  # fmt: skip
ATTENTION = ("layer.0.layer_norm", "layer.0.SelfAttention.", "attention")
CROSS = ("layer.1.layer_norm", "layer.1.EncDecAttention.", "cross")
BLOCKS = {
    side: {
        f"{side}.block.{{}}.{theirs}": f"{side}.blocks.{{}}.{ours}"
        for norm, layer, name in parts
        for theirs, ours in [(norm, f"{name}_norm"), *((layer + x, f"{name}.{x}") for x in "qkvo")]
    }
    for side, parts in (("encoder", [ATTENTION]), ("decoder", [ATTENTION, CROSS]))
}

T5 = Family(
    name="t5",
    title="T5, Flan-T5",
    kind="encoder-decoder",
    prefix="",
    classes={"lm": "T5ForConditionalGeneration"},
    # Distances have no end; this length is where the table of their biases gets large (17 GB).
    constants={"position": "none", "attention_width": 1.0, "max_seq_len": 16384},
    settings=(*SETTINGS, GatedActivation("relu"), T5Head()),
    tensors=(),
)
