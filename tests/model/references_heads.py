"""Tiny random reference models with heads: every family and kind for which there is a class."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.model.references import REFERENCES, randomise
from tests.model.references_encoders import ENCODERS, SUFFIXES, make_encoder, padded, random_text
from tests.model.references_seq2seq import SEQ2SEQ

STEMS = {
    **{f: name.removesuffix("Config") for f, (name, _, _) in {**REFERENCES, **SEQ2SEQ}.items()},
    **{family: stem for family, (stem, _) in ENCODERS.items()},
}
KINDS = [kind for kind in SUFFIXES if kind != "base"]
# (model_type, kind of head) of every class of the reference.
HEADED = [
    (family, kind)
    for family, stem in STEMS.items()
    for kind in KINDS
    if hasattr(transformers, stem + SUFFIXES[kind])
]
LABELS = ("pear", "fig", "plum", "りんご", "kiwi")
EOS = 2


def head_class(family: str, kind: str) -> Any:
    """The reference's class."""
    return getattr(transformers, STEMS[family] + SUFFIXES[kind])


def make_headed(family: str, kind: str, **changes: Any) -> PreTrainedModel:
    """A reference model with a head, all of it random; five labels where it has any."""
    names = dict(enumerate(LABELS))
    labels: dict[str, Any] = {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    if kind not in ("classification", "token_classification"):
        labels = {}
    if family in ENCODERS:
        return make_encoder(family, kind, **{**labels, **changes})
    config_name, _, values = {**REFERENCES, **SEQ2SEQ}[family]
    ids = {"pad_token_id": 1, "eos_token_id": EOS}
    config = getattr(transformers, config_name)(**{**values, **ids, **labels, **changes})
    config._experts_implementation = "eager"
    torch.manual_seed(7)
    return randomise(head_class(family, kind)(config))


def batch_for(theirs: PreTrainedModel, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded texts for the model, and their mask; the source of an encoder-decoder ends itself."""
    shape = (3, 4, 20) if kind == "multiple_choice" else (4, 30)
    text = random_text(min(theirs.config.vocab_size, 67), *shape)
    tokens, mask = padded(text, theirs.config.pad_token_id)
    if theirs.config.model_type in SEQ2SEQ:
        tokens[torch.arange(len(tokens)), mask.sum(1) - 1] = EOS
    return tokens, mask
