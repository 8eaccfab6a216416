"""A field that config.json leaves out means what the class of the reference takes it for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.weights.families import FAMILIES, read_config
from llm_from_scratch.weights.folder import load_folder
from tests.model.references import REFERENCES, randomise
from tests.model.references_encoders import ENCODERS, encoder_class
from tests.model.references_seq2seq import SEQ2SEQ
from tests.model.test_model_parity import assert_close

# Sizes without which a model would be large, no field else; they fit the default heads.
TINY = {"vocab_size": 71, "hidden_size": 64, "intermediate_size": 52, "num_hidden_layers": 3}
BERT = {**TINY, "hidden_size": 48}
T5 = {"vocab_size": 71, "d_model": 36, "d_ff": 52, "num_layers": 3}
BART = {
    "vocab_size": 71, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_ffn_dim": 52, "decoder_ffn_dim": 44,
}  # fmt: skip
SIZES: dict[str, dict[str, int]] = {
    **dict.fromkeys(FAMILIES, TINY),
    "gpt2": {"vocab_size": 71, "n_embd": 48, "n_layer": 3},
    "gpt_neox": {**TINY, "hidden_size": 512},
    "qwen3_moe": {**TINY, "num_hidden_layers": 2, "moe_intermediate_size": 24},
    "gemma3_text": {**TINY, "num_hidden_layers": 7},
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "mpnet"), BERT),
    "distilbert": {"vocab_size": 71, "dim": 48, "hidden_dim": 52, "n_layers": 3},
    "modernbert": {**BERT, "num_hidden_layers": 4},
    **dict.fromkeys(("t5", "mt5"), T5),
    **dict.fromkeys(("bart", "marian"), BART),
}  # fmt: skip
# Tokens the class has numbers for, which the tiny vocabulary must hold.
IDS = {
    "marian": {"decoder_start_token_id": 4, "pad_token_id": 4, "eos_token_id": 5},
    "modernbert": {"pad_token_id": 1},
}
# One block with heads so few that attention over a text past the windows of 4,096 is quick.
FEW = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 1}
# Families with windows by default -> (the field, a small value, the length of a text past them).
WINDOWED = {
    "mistral": ("sliding_window", 8, 4130),
    "gemma2": ("sliding_window", 8, 4130),
    "gemma3_text": ("sliding_window", 8, 4130),
    "modernbert": ("local_attention", 8, 300),
}


def classes(family: str) -> tuple[Any, Any]:
    """The config class and the model class of the reference."""
    if family in ENCODERS:
        return getattr(transformers, f"{ENCODERS[family][0]}Config"), encoder_class(family)
    config, model, _ = {**REFERENCES, **SEQ2SEQ}[family]
    return getattr(transformers, config), getattr(transformers, model)


def assert_same_model(family: str, given: dict[str, Any], folder: Path, length: int) -> None:
    """The class with these fields, and ours from a config.json that holds no others."""
    given = {**given, **IDS.get(family, {})}
    config_class, model_class = classes(family)
    torch.manual_seed(7)
    config = config_class(**given)
    config._experts_implementation = "eager"
    theirs: PreTrainedModel = randomise(model_class(config))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:  # Marian's sinusoids stay
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family, **given}))
    ours, _ = load_folder(folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 71, (1, length), generator=generator)
    with torch.no_grad():
        if isinstance(ours, EncoderDecoder):
            wanted = theirs(input_ids=tokens, decoder_input_ids=tokens[:, :30]).logits
            assert_close(ours(tokens, tokens[:, :30]), wanted)
        else:
            assert_close(ours(tokens), theirs(tokens)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_which_only_the_sizes_are_given(family: str, tmp_path: Path) -> None:
    assert_same_model(family, SIZES[family], tmp_path, 200)


@pytest.mark.parametrize("family", WINDOWED)
def test_which_layers_have_windows_by_default(family: str, tmp_path: Path) -> None:
    field, width, _ = WINDOWED[family]
    assert_same_model(family, {**SIZES[family], field: width}, tmp_path, 60)


@pytest.mark.parametrize("family", WINDOWED)
def test_how_wide_windows_are_by_default(family: str, tmp_path: Path) -> None:
    """A text that is longer than the window of the class."""
    few = {} if family == "modernbert" else FEW
    assert_same_model(family, {**SIZES[family], **few}, tmp_path, WINDOWED[family][2])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_the_type_is_the_class_as_it_is(family: str) -> None:
    """All sizes, of models too large to be made here."""
    whole = json.loads(classes(family)[0]().to_json_string(use_diff=False))
    _, wanted = read_config(whole, "config.json")
    assert read_config({"model_type": family}, "config.json")[1] == wanted
