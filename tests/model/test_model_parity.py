"""Ours equals the reference library in fp32: every decoder family, folders in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.model.config import RopeScaling
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.positions import rope_frequencies
from llm_from_scratch.weights.families import FAMILIES, read_config
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.layouts import put_together
from tests.model.references import REFERENCES, VARIANTS, reference_classes

Pair = tuple[PreTrainedModel, Decoder]
Reference = Callable[..., PreTrainedModel]
Tokens = Callable[..., torch.Tensor]


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to 1e-4 of the largest value, in practice to a tenth of that."""
    assert wanted.std() > 0.05  # the comparison is of something
    scale = wanted.abs().max()
    torch.testing.assert_close(got / scale, wanted / scale, atol=2e-5, rtol=0)


def assert_same_logits(theirs: PreTrainedModel, ours: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, ours.config.vocab_size, (2, 40), generator=generator)
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits)


def test_logits_of_their_folder(pair: Pair) -> None:
    assert_same_logits(*pair)


def test_logits_of_our_folder(pair: Pair, tmp_path: Path) -> None:
    _, ours = pair
    save_folder(ours, None, tmp_path / "model")
    back, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_logits(back.eval(), ours)
    # What the reference read from our config.json says the same to us.
    back.save_pretrained(tmp_path / "again")
    again, _ = load_folder(tmp_path / "again")
    assert again.config == ours.config


@contextmanager
def outputs_of(blocks: Iterable[torch.nn.Module]) -> Iterator[list[list[torch.Tensor]]]:
    """What each block returns, a list per block, for as long as this is open."""
    found: list[list[torch.Tensor]] = []
    hooks = []
    for block in blocks:
        mine: list[torch.Tensor] = []
        found.append(mine)
        # The list is bound here: all blocks would share the last one.
        hooks.append(block.register_forward_hook(lambda _m, _a, out, mine=mine: mine.append(out)))
    yield found
    for hook in hooks:
        hook.remove()


def assert_same_states(
    found: list[list[torch.Tensor]],
    last: torch.Tensor,
    wanted: tuple[torch.Tensor, ...],
    seen: torch.Tensor | None = None,
) -> None:
    """Every block's output, piece after piece in time; `seen` (b, t) is True for text.

    `wanted` holds the embeddings, each block's output but the last, and the last behind its norm.
    """
    assert len(wanted) == len(found) + 1
    got = [*(torch.cat(pieces, 1) for pieces in found[:-1]), last]
    for mine, theirs in zip(got, wanted[1:], strict=True):
        at = slice(None) if seen is None else seen
        assert_close(mine[at], theirs[at])


def padding(side: str, *lengths: int) -> torch.Tensor:
    """(b, 40): 1 for text, 0 for the padding on this side of it."""
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if side == "left" else mask


def told(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the reference must be given of padding: without positions it would count it."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def test_hidden_states(pair: Pair, tokens_for: Tokens) -> None:
    theirs, ours = pair
    tokens = tokens_for(ours)
    with torch.no_grad(), outputs_of(ours.blocks) as found:
        last = ours.hidden(tokens)
        wanted = theirs(tokens, output_hidden_states=True).hidden_states
    assert_same_states(found, last, wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair: Pair, side: str, tokens_for: Tokens) -> None:
    """Every block's states, and the logits."""
    theirs, ours = pair
    tokens, mask = tokens_for(ours, batch=3), padding(side, 40, 23, 5)
    with torch.no_grad(), outputs_of(ours.blocks) as found:
        wanted = theirs(tokens, **told(mask), output_hidden_states=True)
        last = ours.hidden(tokens, document_ids_bt=mask)
        got = ours(tokens, document_ids_bt=mask)
    found = [pieces[:1] for pieces in found]
    assert_same_states(found, last, wanted.hidden_states, mask.bool())
    assert_close(got[mask.bool()], wanted.logits[mask.bool()])


@pytest.mark.parametrize("steps", [[1] * 40, [11, 1, 1, 9, 1, 17]], ids=["one by one", "chunks"])
def test_through_the_cache(pair: Pair, steps: list[int], tokens_for: Tokens) -> None:
    theirs, ours = pair
    tokens = tokens_for(ours)
    cache = KVCache(ours.config, batch=2)
    with torch.no_grad(), outputs_of(ours.blocks) as found:
        wanted = theirs(tokens, output_hidden_states=True)
        last = torch.cat([ours.hidden(part, cache=cache) for part in tokens.split(steps, 1)], 1)
        assert_close(ours.logits(last), wanted.logits)
    assert_same_states(found, last, wanted.hidden_states)


def test_rows_of_different_lengths_in_the_cache(pair: Pair, tokens_for: Tokens) -> None:
    """A padded prompt, then tokens for rows that stand at different positions."""
    theirs, ours = pair
    tokens = tokens_for(ours, batch=3)
    lengths = torch.tensor([21, 4, 13])
    cache = KVCache(ours.config, batch=3)
    with torch.no_grad():
        wanted = theirs(tokens).logits
        ours(tokens[:, :21], cache=cache)
        cache.set_lengths(lengths)
        for step in range(15):
            here = lengths + step
            got = ours(tokens[torch.arange(3), here][:, None], cache=cache)
            assert_close(got[:, 0], wanted[torch.arange(3), here])


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_gradients(pair: Pair, side: str, tokens_for: Tokens) -> None:
    """Of a loss over the text: padding adds nothing."""
    theirs, ours = pair
    tokens = tokens_for(ours)
    mask = padding(side, *((40, 40) if side == "none" else (40, 17)))
    text = (mask[:, 1:] * mask[:, :-1]).bool()  # a token of text, and one to be told from it

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1][text], tokens[:, 1:][text])

    theirs.zero_grad()
    ours.zero_grad()
    if side == "none":
        loss(theirs(tokens).logits).backward()
        loss(ours(tokens)).backward()
    else:
        loss(theirs(tokens, **told(mask)).logits).backward()
        loss(ours(tokens, document_ids_bt=mask)).backward()
    family = FAMILIES[theirs.config.model_type]
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    wanted = dict(stored_gradients(theirs))
    entries = list(family.entries(ours.config, gradients))
    assert {entry.theirs for entry in entries} == set(wanted)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for entry in entries:
        parts = [gradients[name] for name in entry.ours]
        got = put_together(entry, parts, ours.config.n_heads)  # type: ignore[arg-type]
        # Sums over all positions cancel: errors are of the size of the summands.
        scale = wanted[entry.theirs].abs().max() + 1e-3 * largest
        torch.testing.assert_close(got / scale, wanted[entry.theirs] / scale, atol=1e-4, rtol=0)


def stored_gradients(theirs: PreTrainedModel) -> Any:
    """Gradients by the names of the stored tensors: experts, one by one."""
    for name, parameter in theirs.named_parameters():
        base, _, last = name.rpartition(".")
        assert parameter.grad is not None
        if last == "gate_up_proj":
            for e, both in enumerate(parameter.grad):
                gate, up = both.chunk(2)
                yield f"{base}.{e}.gate_proj.weight", gate
                yield f"{base}.{e}.up_proj.weight", up
        elif last == "down_proj":
            for e, down in enumerate(parameter.grad):
                yield f"{base}.{e}.down_proj.weight", down
        elif name == "lm_head.weight" and theirs.config.model_type == "gpt_neox":
            yield "embed_out.weight", parameter.grad
        else:
            yield name, parameter.grad


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_other_values_of_the_fields(
    family: str, changes: dict[str, Any], reference: Reference, tmp_path: Path
) -> None:
    theirs = reference(family, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_folder(tmp_path / "theirs")
    assert_same_logits(theirs, ours)
    save_folder(ours, None, tmp_path / "ours")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval(), ours)


@pytest.mark.parametrize("family", REFERENCES)
def test_every_field_of_the_reference_is_known(family: str, reference: Reference) -> None:
    """A field that a new version adds is noticed: handle, require or list it, and set it here."""
    table = FAMILIES[family]
    config = reference(family).config
    known = table.known() | {"rope_parameters", "_experts_implementation"}
    assert set(config.to_dict()) - known == set()
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(config)} - inherited
    assert own - {"rope_parameters"} <= set(REFERENCES[family][2])
    assert all(reason for reason in table.unused.values())


@pytest.mark.parametrize("family", REFERENCES)
def test_left_out_fields_have_the_defaults_of_the_class(family: str) -> None:
    theirs = json.loads(reference_classes(family)[0]().to_json_string(use_diff=False))
    for field, value in FAMILIES[family].defaults.items():
        # What the class fills in from other fields, or switches off because it is not in use.
        if value is not None and field in theirs and field != "sliding_window":
            assert value == theirs[field], field


@pytest.mark.parametrize("family", REFERENCES)
def test_an_unknown_field_is_named_before_a_weight_is_read(
    family: str, reference: Reference
) -> None:
    values = reference(family).config.to_dict()
    with pytest.raises(UserError, match="the field 'state_size'"):
        read_config({**values, "state_size": 16}, "config.json")
    read_config({**values, "state_size": None}, "config.json")  # not in use


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3_moe"])
def test_bfloat16_folder_keeps_its_precision(
    family: str, reference: Reference, tmp_path: Path
) -> None:
    reference(family).to(torch.bfloat16).save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    wide, _ = load_folder(tmp_path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(theirs.eval(), wide)


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0, 1e6])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotary_frequencies_to_the_bit(theta: float, head_dim: int) -> None:
    """An error of one unit in the last place is an angle of 5e-4 after 8,000 positions."""
    rope = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131072)
    assert torch.equal(
        rope_frequencies(head_dim, theta, None), LlamaRotaryEmbedding(config).inv_freq
    )
    config.rope_parameters = {
        **rope, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    torch.testing.assert_close(
        rope_frequencies(head_dim, theta, RopeScaling(factor=32.0)),
        LlamaRotaryEmbedding(config).inv_freq,
        rtol=3e-7,
        atol=0,
    )
