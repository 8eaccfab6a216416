"""ModernBERT (arXiv:2412.13663): norms before the branches, rotary positions, windows, gates."""

from llm_from_scratch.model.heads import HeadStyle
from llm_from_scratch.weights.families.bert import SIZES
from llm_from_scratch.weights.families.rotary import LayeredRope
from llm_from_scratch.weights.families.settings import (
    Choice,
    Heads,
    Other,
    Windows,
    activation,
    dropout,
    flag,
    number,
    size,
    with_defaults,
)  # fmt: skip
from llm_from_scratch.weights.families.table import ENCODER, Family, HeadTable, named, rules

BLOCK = {"attn_norm": "attention_norm", "attn.Wqkv": "attention.q attention.k attention.v",
         "attn.Wo": "attention.o", "mlp_norm": "feed_forward_norm",
         "mlp.Wi": "feed_forward.gate feed_forward.up", "mlp.Wo": "feed_forward.down"}  # fmt: skip
STYLE = HeadStyle(dense=True, norm=True, dropout=0.0)
DENSE = {"head.dense": "dense", "head.norm": "norm"}
ALL = (flag("classifier_bias", "dense_bias", False), activation("classifier_activation", "gelu"))
LABELS = HeadTable(
    STYLE, rules("", "", {**DENSE, "classifier": "out"}),
    (*ALL, dropout("classifier_dropout"),
     Choice("classifier_pooling", "pooling", "cls", {"cls": "cls", "mean": "mean"})),
)  # fmt: skip

MODERNBERT = Family(
    name="modernbert", title="ModernBERT", kind="encoder", prefix="model.",
    classes=named("ModernBert", *ENCODER),
    constants={"causal": False, "embedding_norm": True, "first_norm": False},
    settings=(*with_defaults(SIZES, vocab_size=50368, intermediate_size=1152, num_hidden_layers=22),
              Heads(default=12, kv=None, dim=None), activation("hidden_activation", "gelu"),
              size("max_position_embeddings", "max_seq_len", 8192),
              LayeredRope(160_000.0, 10_000.0, "global_rope_theta", "local_rope_theta", False),
              Windows("local_attention", 128, every=3, first_full=True, half=True,
                      old_every=("global_attn_every_n_layers",)),
              Choice("norm_bias", "norm", False, {False: "layer_no_bias", True: "layer"}),
              number("norm_eps", "norm_eps", 1e-5), flag("mlp_bias", "feed_forward_bias", False),
              flag("attention_bias", "attention_bias output_bias", False), dropout("mlp_dropout"),
              Other({"attention_dropout": 0.0, "embedding_dropout": 0.0})),
    tensors=(*rules("model.", "", {"embeddings.tok_embeddings": "embedding",
                                   "embeddings.norm": "embedding_norm",
                                   "final_norm": "final_norm"}),
             *rules("model.layers.{}.", "blocks.{}.", BLOCK)),
    heads={**dict.fromkeys(("classification", "token_classification", "multiple_choice"), LABELS),
           "masked_lm": HeadTable(STYLE, rules("", "", {**DENSE, "decoder": "out"}),
                                  (*ALL, flag("decoder_bias", "bias", True)))},
    required={"position_embedding_type": "absolute", "rope_scaling": None},
    unused={"initializer_cutoff_factor": "how fresh weights are drawn",
            "layer_norm_eps": "another name of norm_eps, of which norm_eps is read",
            **dict.fromkeys(("sparse_prediction", "sparse_pred_ignore_index"), "for training only"),
            **dict.fromkeys(("reference_compile", "deterministic_flash_attn",
                             "repad_logits_with_grad"), "how the same values are computed")},
    other_heads=("qa_outputs.",),
)  # fmt: skip
