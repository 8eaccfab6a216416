"""Every decoder family writes through the same engine what the reference library writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_from_scratch.generate.engine import generate_tokens
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.weights.folder import load_folder
from tests.model.references import REFERENCES, make_reference


@pytest.mark.parametrize("family", REFERENCES)
def test_greedy_text_is_the_references(family: str, tmp_path: Path) -> None:
    theirs = make_reference(family)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    assert isinstance(ours, Decoder)
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(0, ours.config.vocab_size, (length,), generator=generator).tolist()
        for length in (13, 4, 9)
    ]
    written: list[list[int]] = [[] for _ in prompts]
    settings = SamplingSettings(temperature=0, max_new_tokens=30)
    for step in generate_tokens(ours, prompts, settings):
        for new in step:
            written[new.request].append(new.token)
    for prompt, got in zip(prompts, written, strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert got == wanted[0, len(prompt) :].tolist()
