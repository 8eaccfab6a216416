"""A thousand teacher-forced tokens through the kernels, beside the same weights in PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_from_scratch.core.errors import RunError
from llm_from_scratch.generate.fast import KernelRunner
from llm_from_scratch.generate.requests import Feed, Request, Sequence
from llm_from_scratch.generate.sampling import Chooser, SamplingSettings, make_generator
from llm_from_scratch.model.cache import PagePool
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.quant import kernels
from llm_from_scratch.weights.catalogue import pull
from llm_from_scratch.weights.sources import load
from tests.generate.test_fast import SHAPES, packed_model, plain_copy

pytestmark = pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler")
PAGE = kernels.PAGE


@torch.inference_mode()
def through_the_kernels(model: Decoder, ids: list[int], piece: int) -> torch.Tensor:
    """The logits of each token, read in pieces as the engine reads long prompts."""
    pages = -(-len(ids) // PAGE)
    runner = KernelRunner(model, PagePool(model.config, 1 + pages, PAGE))
    settings = SamplingSettings()
    chooser = Chooser(settings, make_generator(1), ids)
    sequence = Sequence(0, 0, Request(ids, settings), ids, len(ids), chooser)
    sequence.table = list(range(pages, 0, -1))
    found = []
    for start in range(0, len(ids), piece):
        part = ids[start : start + piece]
        found.append(runner.run([Feed(sequence, part, len(part))]).clone())
        sequence.cached += len(part)
    return torch.cat(found)


def assert_same_distribution(ours: torch.Tensor, twin: torch.Tensor) -> None:
    assert len(ours) == len(twin) >= 1000
    p, q = twin.log_softmax(-1), ours.log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) <= 1e-4
    assert float((p.argmax(-1) == q.argmax(-1)).float().mean()) >= 0.99


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", ["llama", "gemma3"])
def test_random_weights(shape: str, bits: int) -> None:
    model = packed_model(SHAPES[shape], bits)
    texts = (torch.randint(0, 83, (11, 96), generator=torch.Generator().manual_seed(4))).tolist()
    ours = [through_the_kernels(model, ids, 40) for ids in texts]
    with torch.no_grad():
        twin = plain_copy(model)(torch.tensor(texts))
    assert_same_distribution(torch.cat(ours), twin.flatten(0, 1))


@pytest.mark.weights
def test_a_published_model(data_dir: Path) -> None:
    try:
        path = pull("smollm2-135m")
    except RunError as error:
        pytest.skip(str(error))
    model, tokenizer = load(path, device="cpu")
    text = (data_dir / "wikitext2-valid" / "wiki.valid.tokens").read_text(encoding="utf-8")
    ids = tokenizer.encode(text[:9000])[:1000]
    assert isinstance(model, Decoder)
    ours = through_the_kernels(model, ids, 125)
    twin, _ = load(path, device="cpu", dtype="fp32")
    with torch.no_grad():
        assert_same_distribution(ours, twin(torch.tensor([ids]))[0])
