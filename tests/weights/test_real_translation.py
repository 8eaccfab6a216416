"""A published translator through `llm.load` and `complete`, beside the reference library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llm_from_scratch as llm
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.weights.convert import convert
from tests.weights.real_files import real

pytestmark = pytest.mark.weights
SENTENCES = [
    "Hello.",
    "Where is the nearest bus stop?",
    "She has been learning Japanese for three years, but she still cannot read newspapers.",
    "He asked me whether I had seen his cat, and I said no.",
]


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_translations_are_the_references(tmp_path: Path) -> None:
    """Sources of unequal length in one batch; every token of the translations is the same."""
    from transformers import MarianMTModel, MarianTokenizer

    convert(real("opus-mt-en-fr"), "hf", tmp_path / "model", report=lambda _: None)
    model, tokenizer = llm.load(tmp_path / "model", device="cpu")
    assert isinstance(model, EncoderDecoder)
    ours = complete(model, tokenizer, SENTENCES, temperature=0.0, max_new_tokens=60)
    theirs = MarianMTModel.from_pretrained(tmp_path / "model").eval()
    vocabulary = MarianTokenizer.from_pretrained(tmp_path / "model")
    for sentence, result in zip(SENTENCES, ours, strict=True):
        source = vocabulary([sentence], return_tensors="pt")
        with torch.inference_mode():
            ids = theirs.generate(**source, num_beams=1, do_sample=False, max_new_tokens=60)[0]
        assert result.tokens == ids[1:-1].tolist()
        assert result.text == vocabulary.decode(ids, skip_special_tokens=True)
        assert result.finish_reason == "stop"
    assert ours[1].text == "Où est l'arrêt de bus le plus proche ?"
