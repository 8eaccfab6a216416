"""mT5 (arXiv:2010.11934): T5 for 101 languages, gated, its logits as they are."""

from dataclasses import replace

from llm_from_scratch.weights.families.pairs import GatedActivation
from llm_from_scratch.weights.families.settings import Heads, flag, of, with_defaults
from llm_from_scratch.weights.families.t5 import SETTINGS, T5
from llm_from_scratch.weights.families.table import PAIR, named

MT5 = replace(
    T5,
    name="mt5",
    title="mT5",
    classes=named("MT5", *PAIR, lm="MT5ForConditionalGeneration", encoder="MT5EncoderModel"),
    settings=(
        *with_defaults(
            SETTINGS,
            Heads("d_model", "num_heads", 6, None, dim="d_kv", dim_default=64, even=False),
            vocab_size=250112,
            d_ff=1024,
            num_layers=8,
        ),
        GatedActivation("gated-gelu"),
        *of("decoder", flag("tie_word_embeddings", "tie_embeddings", True)),
    ),
)
