"""Tiny random encoders of the reference library, in the manner of `references`.

No id of theirs means padding in a text: ids from 5 on are drawn. Contexts of 40 tokens pass every
window; MPNet's go past the distance from which on all are one.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.model.references import FULL, SLIDE, randomise

PAD = 1
IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": PAD}
BERT: dict[str, Any] = {
    **IDS, "vocab_size": 67, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 52, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 50, "type_vocab_size": 5,
    "initializer_range": 0.3, "layer_norm_eps": 3e-4, "classifier_dropout": 0.2, "use_cache": True,
    "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
OWN = ("type_vocab_size", "classifier_dropout", "use_cache", "is_decoder", "add_cross_attention")

# model_type -> (beginning of the classes' names, every field of the config).
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", BERT),
    "roberta": ("Roberta", {**BERT, "pad_token_id": 3, "max_position_embeddings": 54}),
    "xlm-roberta": ("XLMRoberta", {**BERT, "type_vocab_size": 1}),
    "distilbert": ("DistilBert", {
        **IDS, "vocab_size": 67, "max_position_embeddings": 50, "sinusoidal_pos_embds": False,
        "n_layers": 3, "n_heads": 4, "dim": 36, "hidden_dim": 52, "dropout": 0.1,
        "attention_dropout": 0.1, "activation": "gelu", "initializer_range": 0.3,
        "qa_dropout": 0.1, "seq_classif_dropout": 0.2, "tie_word_embeddings": True,
    }),
    "mpnet": ("MPNet", {
        **{k: v for k, v in BERT.items() if k not in OWN}, "max_position_embeddings": 172,
        "relative_attention_num_buckets": 32,
    }),
    "modernbert": ("ModernBert", {
        **IDS, "cls_token_id": 0, "sep_token_id": 2, "vocab_size": 67, "hidden_size": 40,
        "intermediate_size": 52, "num_hidden_layers": 4, "num_attention_heads": 5,
        "hidden_activation": "gelu", "max_position_embeddings": 48, "initializer_range": 0.3,
        "initializer_cutoff_factor": 2.0, "norm_eps": 3e-4, "norm_bias": False,
        "attention_bias": True, "attention_dropout": 0.1, "layer_types": [FULL, SLIDE, SLIDE, FULL],
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 900.0},
            SLIDE: {"rope_type": "default", "rope_theta": 70.0},
        },
        "local_attention": 10, "embedding_dropout": 0.1, "mlp_bias": True, "mlp_dropout": 0.1,
        "decoder_bias": True, "classifier_pooling": "mean", "classifier_dropout": 0.2,
        "classifier_bias": True, "classifier_activation": "silu", "deterministic_flash_attn": False,
        "sparse_prediction": False, "sparse_pred_ignore_index": -100, "tie_word_embeddings": True,
    }),
}  # fmt: skip

# Other values of the fields, each a model of its own.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"hidden_act": "gelu_new", "type_vocab_size": 1, "tie_word_embeddings": False}),
    ("bert", {"hidden_act": "relu", "classifier_dropout": None}),
    ("roberta", {"hidden_act": "gelu_pytorch_tanh", "pad_token_id": 0}),
    ("roberta", {"tie_word_embeddings": False}),
    ("xlm-roberta", {"hidden_act": "silu", "type_vocab_size": 2}),
    ("distilbert", {"activation": "relu", "sinusoidal_pos_embds": True}),
    ("distilbert", {"tie_word_embeddings": False}),
    ("mpnet", {"hidden_act": "gelu_new", "num_attention_heads": 6}),
    ("mpnet", {"tie_word_embeddings": False}),
    ("modernbert", {"norm_bias": True, "attention_bias": False, "mlp_bias": False}),
    ("modernbert", {"local_attention": 7, "layer_types": None, "rope_parameters": None}),
    ("modernbert", {"hidden_activation": "gelu_pytorch_tanh", "decoder_bias": False,
                    "classifier_bias": False, "classifier_pooling": "cls"}),
    ("modernbert", {"tie_word_embeddings": False, "classifier_activation": "gelu"}),
    ("modernbert", {"rope_parameters": {
        FULL: {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0},
        SLIDE: {"rope_type": "default", "rope_theta": 70.0},
    }}),
]  # fmt: skip
SUFFIXES = {
    "base": "Model",
    "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "multiple_choice": "ForMultipleChoice",
    "masked_lm": "ForMaskedLM",
}


def encoder_class(family: str, kind: str = "base") -> Any:
    """The model class of a family with a kind of head."""
    return getattr(transformers, ENCODERS[family][0] + SUFFIXES[kind])


def make_encoder(
    family: str, kind: str = "base", options: dict[str, Any] | None = None, **changes: Any
) -> PreTrainedModel:
    """A reference encoder with random parameters; `options` are those of its constructor."""
    name, values = ENCODERS[family]
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**{**values, **changes})
    model = randomise(encoder_class(family, kind)(config, **(options or {})))
    with torch.no_grad():  # about zero, or all texts end up as the same vector
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter -= 0.7
    return model


def random_text(vocab_size: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Ids of which none is special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, vocab_size, shape, generator=generator)


def padded(tokens: torch.Tensor, pad_id: int, side: str = "right") -> tuple[torch.Tensor, ...]:
    """The tokens with rows of different lengths, the rest padding, and the attention mask."""
    t = tokens.shape[-1]
    rows = tokens.flatten(0, -2).shape[0]
    lengths = torch.tensor([t, *(3 + 7 * row % (t - 3) for row in range(1, rows))])
    mask = (torch.arange(t) < lengths[:, None]).long().view(tokens.shape)
    if side == "left":
        mask = mask.flip(-1)
    return torch.where(mask.bool(), tokens, pad_id), mask
