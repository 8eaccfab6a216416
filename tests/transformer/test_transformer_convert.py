"""The Transformer to read has the logits of the encoder-decoder, and of the reference's Marian."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import MarianMTModel

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.engine import generate_tokens
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.transformer import (
    Transformer,
    create_padding_mask,
    create_subsequent_mask,
    layer_norm,
)
from llm_from_scratch.transformer.convert import to_encoder_decoder
from llm_from_scratch.weights.families import family_of
from llm_from_scratch.weights.folder import load_folder, save_folder

BEGIN, END, PAD = 1, 2, 0


def teacher(**changes: int) -> Transformer:
    """Sizes that cannot be mixed up, and norms and biases away from one and zero."""
    torch.manual_seed(0)
    sizes = {
        "src_vocab_size": 41, "tgt_vocab_size": 37, "max_sequence_len": 30, "d_model": 36,
        "n_blocks": 3, "n_heads": 6, "d_k": 6, "d_v": 6, "d_ff": 52,
    }  # fmt: skip
    model = Transformer(**{**sizes, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("gamma" in name))
    return model.eval()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, 41, (3, 30), generator=generator)
    source[1, 17:] = PAD
    return source, torch.randint(3, 37, (3, 25), generator=generator)


def taught_logits(model: Transformer) -> torch.Tensor:
    source, target = texts()
    hidden = create_padding_mask(source, PAD)
    with torch.no_grad():
        return model(source, target, hidden, create_subsequent_mask(25), hidden)


def assert_relative(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.std() > 0.3
    scale = wanted.abs().max()
    torch.testing.assert_close(got / scale, wanted / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sizes", [{}, {"d_model": 35, "n_heads": 5, "d_k": 7, "d_v": 7}])
def test_logits_of_the_encoder_decoder(sizes: dict[str, int]) -> None:
    """Also where there is one sine more than cosines."""
    model = teacher(**sizes)
    source, target = texts()
    ours = to_encoder_decoder(model, start_id=BEGIN)
    with torch.no_grad():
        got = ours(source, target, attention_mask=(source != PAD).long())
    assert_relative(got, taught_logits(model))


def test_logits_of_the_references_marian(tmp_path: Path) -> None:
    model = teacher()
    source, target = texts()
    ours = to_encoder_decoder(model, start_id=BEGIN, end_id=END)
    assert family_of(ours.config).name == "marian"
    save_folder(ours, None, tmp_path / "marian")
    theirs, info = MarianMTModel.from_pretrained(tmp_path / "marian", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        got = theirs.eval()(
            input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=target
        ).logits
    assert_relative(got, taught_logits(model))
    back, _ = load_folder(tmp_path / "marian")
    assert isinstance(back, EncoderDecoder)
    assert back.config == ours.config
    assert all(map(torch.equal, back.parameters(), ours.parameters()))


def test_what_is_written_is_the_same() -> None:
    model = teacher()
    source, _ = texts()
    with torch.no_grad():  # or the shifts would decide, and the same token always win
        for name, parameter in model.named_parameters():
            if "beta" in name:
                parameter.zero_()
    sources = source[[0, 2]]
    written = model.inference(sources, BEGIN, END, max_new_tokens=20)[:, 1:].tolist()
    assert all(BEGIN not in row and len(set(row)) >= 3 for row in written)
    settings = SamplingSettings(max_new_tokens=20, temperature=0.0)
    found: list[list[int]] = [[], []]
    ours = to_encoder_decoder(model, start_id=BEGIN)
    for step in generate_tokens(ours, sources.tolist(), settings, [END]):
        for new in step:
            found[new.request].append(new.token)
    for ours_here, theirs_here in zip(found, written, strict=True):
        # A row that has ended is filled up there.
        assert theirs_here == ours_here + [END] * (20 - len(ours_here))


def test_how_far_the_two_norms_are_apart() -> None:
    """As the module says: a share of 5e-6 / variance at most."""
    generator = torch.Generator().manual_seed(2)
    for std in (0.1, 0.3, 1.0, 10.0):
        x = torch.randn(200, 36, generator=generator, dtype=torch.float64) * std
        smallest = x.var(dim=-1, correction=0).min()
        taught, ours = layer_norm(x), F.layer_norm(x, (36,), eps=1e-5)
        share = ((taught - ours).abs() / taught.abs()).max()
        assert 0 < share <= 5e-6 / smallest


@pytest.mark.parametrize(
    "changes", [{"d_k": 5}, {"d_v": 8}, {"d_k": 7, "d_v": 7}, {"n_heads": 5}, {"n_blocks": 0}]
)
def test_sizes_that_marian_cannot_express_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"d_k is|no blocks"):
        to_encoder_decoder(teacher(**changes), start_id=BEGIN)
