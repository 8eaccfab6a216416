"""What is seen inside a model is what the reference library says is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model import inside
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.heads import HeadConfig, make_head
from llm_from_scratch.model.inside import (
    Reading,
    attention_weights,
    cosines,
    logit_lens,
    neighbours,
)
from llm_from_scratch.quant.linear import QuantEmbedding, QuantLinear, set_module
from llm_from_scratch.quant.packed import PackedWeight
from llm_from_scratch.quant.rtn import quantize_rtn
from llm_from_scratch.weights.folder import load_folder
from llm_from_scratch.weights.packing import unpacked
from tests.model.architectures import ARCHITECTURES, ids, make, without_dropout
from tests.model.references_encoders import ENCODERS, make_encoder, random_text
from tests.model.references_seq2seq import SEQ2SEQ, make_seq2seq

Pair = tuple[PreTrainedModel, Decoder]
Reference = Callable[..., PreTrainedModel]
LENGTH = 40  # past every window of the references


def eager(theirs: PreTrainedModel) -> PreTrainedModel:
    theirs.set_attn_implementation("eager")
    return theirs


def loaded(theirs: PreTrainedModel, folder: Path) -> Any:
    theirs.save_pretrained(folder)
    return load_folder(folder)[0]


def assert_rows_sum_to_one(weights: Tensor) -> None:
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def assert_same_weights(model: Any, tokens: Tensor, wanted: tuple[Tensor, ...]) -> None:
    for layer, theirs in enumerate(wanted):
        got = attention_weights(model, tokens, layer)
        assert_rows_sum_to_one(got)
        torch.testing.assert_close(got, theirs[0], atol=2e-5, rtol=1e-4)


# --- attention -----------------------------------------------------------------------------------


def test_attention_of_decoders(pair: Pair, tokens_for: Any) -> None:
    theirs, ours = pair
    tokens = tokens_for(ours, batch=1, length=LENGTH)
    with torch.no_grad():
        wanted = eager(theirs)(tokens, output_attentions=True).attentions
    assert len(wanted) == ours.config.n_layers
    assert_same_weights(ours, tokens[0], wanted)


@pytest.mark.parametrize("family", list(ENCODERS))
def test_attention_of_encoders(family: str, tmp_path: Path) -> None:
    theirs = eager(make_encoder(family))
    ours = loaded(theirs, tmp_path)
    tokens = random_text(ours.config.vocab_size, 1, LENGTH)
    with torch.no_grad():
        wanted = theirs(tokens, output_attentions=True).attentions
    assert_same_weights(ours, tokens[0], wanted)
    # Under a head it is the same encoder.
    headed = make_head(ours, HeadConfig("embedding"))
    got = attention_weights(headed, tokens[0], 1)
    torch.testing.assert_close(got, wanted[1][0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", list(SEQ2SEQ))
def test_attention_and_lens_of_both_sides(family: str, tmp_path: Path) -> None:
    theirs = eager(make_seq2seq(family))
    ours = loaded(theirs, tmp_path)
    assert isinstance(ours, EncoderDecoder)
    source = random_text(ours.config.encoder.vocab_size, 1, LENGTH)
    target = random_text(ours.config.vocab_size, 1, 17, seed=1)
    with torch.no_grad():
        wanted = theirs(input_ids=source, decoder_input_ids=target, output_attentions=True)
        logits = ours(source, target)[0]
    assert_same_weights(ours, source[0], wanted.encoder_attentions)
    sides = ((False, wanted.decoder_attentions), (True, wanted.cross_attentions))
    for across, attentions in sides:
        for layer, theirs_l in enumerate(attentions):
            got = attention_weights(ours, target[0], layer, source=source[0], across=across)
            assert_rows_sum_to_one(got)
            torch.testing.assert_close(got, theirs_l[0], atol=2e-5, rtol=1e-4)
    lens = logit_lens(ours, target[0], top=4, source=source[0])
    torch.testing.assert_close(lens.probabilities_ltk[-1], logits.softmax(-1).topk(4).values)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_layers_output_is_its_weights_times_its_values(name: str) -> None:
    """Of every architecture: the weights that are shown are those that the model used."""
    model = make(without_dropout(ARCHITECTURES[name])).eval()
    stack = inside.reader_of(model)  # type: ignore[arg-type]
    block: Any = stack.blocks[-1]
    tokens = ids(ARCHITECTURES[name], LENGTH)
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad(), inside.overheard(block.attention) as heard:
        inner = block.attention.mix

        def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
            seen.append((v, inner(q, k, v, mask, causal)))
            return seen[-1][1]

        block.attention.mix = mix
        if isinstance(model, EncoderDecoder):
            model.encoder(tokens[None])
        else:
            model(tokens[None])
    (weights,), ((v_bksd, y_btm),) = heard, seen
    v_bhsd = v_bksd.repeat_interleave(weights.shape[1] // v_bksd.shape[1], dim=1)
    with torch.no_grad():
        wanted = block.attention.o((weights @ v_bhsd).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y_btm, wanted, atol=1e-4, rtol=1e-4)
    assert "mix" not in vars(block.attention)


def test_nothing_is_seen_ahead_or_beyond_a_window(reference: Reference, tmp_path: Path) -> None:
    ours = loaded(reference("mistral"), tmp_path)
    weights = attention_weights(ours, list(range(LENGTH)), 1)
    back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None]
    assert (weights[:, (back < 0) | (back >= ours.config.window)] == 0).all()
    assert (weights[:, (back >= 0) & (back < ours.config.window)] > 0).all()


def test_looking_changes_nothing(pair: Pair, tokens_for: Any) -> None:
    _, ours = pair
    tokens = tokens_for(ours, batch=1, length=12)
    before = ours(tokens)
    attention_weights(ours, tokens[0], 1)
    logit_lens(ours, tokens[0])
    neighbours(ours, 3)
    assert torch.equal(ours(tokens), before)
    assert before.requires_grad and not ours.training


def test_a_model_in_training_is_looked_at_without_dropout() -> None:
    model = make(ARCHITECTURES["llama-d192"])
    assert isinstance(model, Decoder) and model.config.dropout > 0
    found = [logit_lens(model, [5, 6, 7]) for _ in range(2)]
    assert torch.equal(found[0].probabilities_ltk, found[1].probabilities_ltk)
    assert model.training and all(part.training for part in model.modules())
    torch.testing.assert_close(
        attention_weights(model, [5, 6, 7], 1), attention_weights(model.eval(), [5, 6, 7], 1)
    )


# --- the logit lens ------------------------------------------------------------------------------


def test_the_lens(pair: Pair, tokens_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the blocks their hidden states through norm and head; at the end their logits."""
    theirs, ours = pair
    monkeypatch.setattr(inside, "LOGITS_AT_ONCE", 7 * ours.config.vocab_size)  # 40 = 5 * 7 + 5
    tokens = tokens_for(ours, batch=1, length=LENGTH)
    lens = logit_lens(ours, tokens[0], top=5)
    base: Any = theirs.base_model
    norm = next(
        getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name)
    )
    with torch.no_grad():
        said = theirs(tokens, output_hidden_states=True)
        # Of the last state they return what is behind the norm.
        states = [norm(state) for state in said.hidden_states[:-1]] + [said.hidden_states[-1]]
        wanted = [head(theirs, state[0]).softmax(-1) for state in states]
        assert torch.equal(wanted[-1], said.logits[0].softmax(-1))
    assert lens.ids_ltk.shape == (ours.config.n_layers + 1, LENGTH, 5)
    for got_ids, got, probabilities in zip(*lens, wanted, strict=True):
        wanted_tk = probabilities.topk(5).values
        assert wanted_tk.std() > 0.01  # the comparison is of something
        torch.testing.assert_close(got, wanted_tk, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(got, probabilities.gather(1, got_ids), atol=2e-5, rtol=1e-3)


def head(theirs: PreTrainedModel, state: Tensor) -> Tensor:
    logits: Tensor = theirs.get_output_embeddings()(state)
    cap = getattr(theirs.config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


def test_the_lens_is_for_decoders() -> None:
    encoder, decoder = (make(ARCHITECTURES[name]) for name in ("bert", "llama"))
    assert isinstance(encoder, Encoder) and isinstance(decoder, Decoder)
    pair = make(ARCHITECTURES["t5"])
    for model in (encoder, make_head(decoder, HeadConfig("embedding")), pair):
        with pytest.raises(UserError, match="predicts no next token"):
            logit_lens(model, [1, 2])  # type: ignore[arg-type]


# --- neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "bert", "marian"])
def test_neighbours_by_brute_force(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make(ARCHITECTURES[name])
    table = inside.reader_of(model).embedding.weight.detach()
    table[9] = 0.0  # a row that was never trained has no direction
    monkeypatch.setattr(inside, "AT_ONCE", 10 * table.shape[1])
    assert len(list(cosines(model, 5))) == -(-len(table) // 10)
    got = neighbours(model, 5, top=6)
    every = F.cosine_similarity(table[5][None], table)
    every[5] = -2
    assert got.ids_k.tolist() == every.topk(6).indices.tolist()
    torch.testing.assert_close(got.cosines_k, every.topk(6).values)
    assert neighbours(model, 5, top=10**9).ids_k.numel() == len(table) - 1
    assert neighbours(model, 5, top=10**9, count=20).ids_k.max() == 19
    assert neighbours(model, 40, top=30, count=20).ids_k.numel() == 19  # a spare row itself
    assert neighbours(model, 9).cosines_k.tolist() == [0.0] * 12


# --- weights in 4 bits ---------------------------------------------------------------------------


def packed_model(**changes: Any) -> Decoder:
    """Llama-like, every matrix packed in 4 bits, the table too."""
    fields: dict[str, Any] = {
        "vocab_size": 83, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 32, "d_ff": 96, "max_seq_len": 48, "init_std": 0.3, **changes,
    }  # fmt: skip
    model = Decoder(ModelConfig(**fields))
    model.initialise(3)
    for name, part in list(model.named_modules()):
        if isinstance(part, nn.Linear | nn.Embedding):
            made = quantize_rtn(part.weight.detach(), bits=4, group_size=32)
            packed = PackedWeight.from_groups(made.codes_oi, made.scales_og, made.offsets(), 4)
            kind = QuantEmbedding if isinstance(part, nn.Embedding) else QuantLinear
            set_module(model, name, kind(packed))
    return model.eval()


def test_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_model(window=5, window_layers=(1,), attention_softcap=2.0)
    dense: Any = unpacked(packed)
    assert isinstance(dense.embedding, nn.Embedding)
    tokens = list(range(20))
    for layer in (0, 1):
        got = attention_weights(packed, tokens, layer)
        assert_rows_sum_to_one(got)
        torch.testing.assert_close(got, attention_weights(dense, tokens, layer), atol=1e-3, rtol=0)
    ours, wanted = logit_lens(packed, tokens), logit_lens(dense, tokens)
    torch.testing.assert_close(
        ours.probabilities_ltk, wanted.probabilities_ltk, atol=2e-3, rtol=1e-2
    )
    monkeypatch.setattr(inside, "AT_ONCE", 640)
    found, known = neighbours(packed, 7), neighbours(dense, 7)
    assert found.ids_k.tolist() == known.ids_k.tolist()
    torch.testing.assert_close(found.cosines_k, known.cosines_k)


# --- asked wrongly -------------------------------------------------------------------------------


def test_a_wrong_question_is_answered_in_a_sentence() -> None:
    model = make(ARCHITECTURES["llama"])
    assert isinstance(model, Decoder)
    last = model.config.vocab_size - 1
    for given, said in (
        ([], "no token to look at"),
        ([last + 1], f"vocabulary ends at {last}"),
        ([-1], "There is no token -1"),
        ([1] * (model.config.max_seq_len + 1), "context is"),
    ):
        with pytest.raises(UserError, match=said):
            logit_lens(model, given)
    for layer in (-1, model.config.n_layers):
        with pytest.raises(UserError, match="There is no layer"):
            attention_weights(model, [1], layer)
    with pytest.raises(UserError, match="Only an encoder-decoder"):
        attention_weights(model, [1], 0, source=[1])
    with pytest.raises(UserError, match="needs the ids of a source"):
        attention_weights(model, [1], 0, across=True)
    with pytest.raises(UserError, match=f"There is no token {last + 1}"):
        neighbours(model, last + 1)


def test_a_mixer_without_attention_is_named() -> None:
    model = make(ARCHITECTURES["llama"])
    assert isinstance(model, Decoder)
    model.blocks[0].attention = nn.Identity()
    with pytest.raises(UserError, match=r"Block 0 has no attention weights: .* Identity"):
        Reading(model, [1, 2]).watched_step()
