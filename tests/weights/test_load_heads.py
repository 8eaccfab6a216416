"""`llm.load` puts a head on whatever MODEL is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForSequenceClassification

import llm_from_scratch as llm
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.requests import as_writer
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.heads import Embedder, SequenceClassifier
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.families import FAMILIES
from tests.weights.conftest import GGUFCase

Make = Callable[..., Decoder]


def test_a_folder(
    make_model: Make, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.save(make_model(tie_embeddings=False), tokenizer, tmp_path / "lm")
    model, same = llm.load(
        tmp_path / "lm", device="cpu", head="classification", labels=["no", "yes"]
    )
    assert isinstance(model, SequenceClassifier) and not model.training
    assert "no head for classification with 2 labels: score starts" in capsys.readouterr().err
    llm.save(model, same, tmp_path / "classifier")
    again, _ = llm.load(tmp_path / "classifier", device="cpu")  # what was saved
    assert isinstance(again, SequenceClassifier) and again.head_config.labels == ("no", "yes")
    assert capsys.readouterr().err == ""
    tokens = torch.tensor([tokenizer.encode(text)[:4] for text in ("the man in", "an the in")])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert theirs.config.pad_token_id == tokenizer.pad_id
    with torch.no_grad():
        torch.testing.assert_close(again(tokens), theirs(tokens).logits, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="There is no head 'clasify'"):
        llm.load(tmp_path / "lm", device="cpu", head="clasify")


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_a_classifier_whose_head_is_missing_is_no_language_model(
    kind: str, make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Its embedding is there, so that it could write: config.json says that it labels."""
    llm.save(make_model(), tokenizer, tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text("utf-8"))
    name = FAMILIES["llama"].classes[kind]
    config.write_text(json.dumps({**values, "architectures": [name]}), "utf-8")
    with pytest.raises(UserError, match=r"lacks \d tensor.*'score\.\w+'"):
        llm.load(tmp_path, device="cpu")
    assert isinstance(llm.load(tmp_path, device="cpu", head="none")[0], Decoder)


def test_an_embedder_is_one_without_being_asked(
    make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    llm.save(make_model(), tokenizer, tmp_path / "lm")
    model, _ = llm.load(tmp_path / "lm", device="cpu", head="embedding")
    llm.save(model, tokenizer, tmp_path / "embedder")
    again, _ = llm.load(tmp_path / "embedder", device="cpu")
    assert isinstance(again, Embedder) and again.head_config.style == model.head_config.style
    plain, _ = llm.load(tmp_path / "embedder", device="cpu", head="none")
    assert isinstance(plain, Decoder)
    with pytest.raises(UserError, match=r"For embeddings: llm\.load\(MODEL, head='embedding'\)"):
        as_writer(again)


def test_a_gguf_file(gguf_case: type[GGUFCase], tmp_path: Path) -> None:
    path = gguf_case(GGMLQuantizationType.F16).write(tmp_path / "model.gguf")
    plain, tokenizer = llm.load(path, device="cpu", head="none")
    assert isinstance(plain, Decoder)
    model, _ = llm.load(path, device="cpu", head="embedding")
    assert isinstance(model, Embedder) and model.head_config.style.pooling == "last"
    tokens = torch.tensor([tokenizer.encode("the man")])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain.hidden(tokens)[:, -1])
