"""The GPT to read: names, shapes, and the same logits as the decoder it maps into."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import llm_from_scratch.gpt as package
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.gpt import GPT, GPTConfig, SimpleTokenizer, to_decoder
from llm_from_scratch.gpt.model import GPTMultiHeadAttention, TransformerBlock
from llm_from_scratch.weights.folder import load_folder, save_folder


def small(**changes: float) -> GPT:
    """Sizes that cannot be mixed up, and norms and biases away from one and zero."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 37, "n_embd": 24, "n_layer": 3, "n_head": 4, "block_size": 11, "dropout": 0.2,
    }  # fmt: skip
    model = GPT(**{**sizes, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_public_names() -> None:
    names = {"GPT", "GPTConfig", "SimpleTokenizer", "TextDataset", "create_dataloaders"}
    assert names | {"GPTTrainer"} <= set(package.__all__)
    sizes = ["vocab_size", "n_embd", "n_layer", "n_head", "block_size", "dropout"]
    parameters = inspect.signature(GPT).parameters
    assert list(parameters) == sizes
    assert [parameters[name].default for name in sizes[1:]] == [768, 12, 12, 1024, 0.1]
    for cls in (GPTMultiHeadAttention, TransformerBlock):
        assert list(inspect.signature(cls).parameters) == ["n_embd", "n_head", "dropout"]
    generate = inspect.signature(GPT.generate).parameters
    assert list(generate)[1:] == ["idx", "max_new_tokens", "temperature", "top_k"]
    assert generate["temperature"].default == 1.0 and generate["top_k"].default is None


def test_state_dict_keys_and_attributes() -> None:
    model = small()
    kinds = ("weight", "bias")
    expected = ["token_embedding.weight", "position_embedding.weight", "head.weight"]
    expected += [f"ln_f.{kind}" for kind in kinds]
    for i in range(3):
        heads = [f"attention.heads.{h}.linear_{part}" for h in range(4) for part in "qkv"]
        attention = [f"attn.{name}" for name in [*heads, "attention.linear_o"]]
        for name in ("ln_1", *attention, "ln_2", "mlp.0", "mlp.2"):
            expected += [f"blocks.{i}.{name}.{kind}" for kind in kinds]
    assert sorted(model.state_dict()) == sorted(expected)
    model(torch.zeros(1, 7, dtype=torch.long))
    assert sorted(model.state_dict()) == sorted(expected)  # the mask is not a weight
    assert (model.block_size, model.n_embd) == (11, 24)
    assert isinstance(model.blocks, torch.nn.Sequential)
    assert model.head.weight is not model.token_embedding.weight


def test_first_weights() -> None:
    torch.manual_seed(0)
    model = GPT(500, 64, 2, 2, 64)
    for name, parameter in model.named_parameters():
        if "ln" in name:
            assert parameter.eq(1.0 if name.endswith("weight") else 0.0).all()
        elif name.endswith("bias"):
            assert parameter.eq(0.0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1)


def test_forward_shapes_and_loss() -> None:
    model = small()
    idx, targets = torch.randint(0, 37, (2, 9)), torch.randint(0, 37, (2, 9))
    targets[0, :4] = -100
    logits, nothing = model(idx)
    assert logits.shape == (2, 9, 37) and nothing is None
    flat, loss = model(idx, targets)
    assert flat.shape == (18, 37)
    assert torch.equal(flat, logits.flatten(0, 1))
    assert torch.allclose(loss, F.cross_entropy(flat[4:], targets.flatten()[4:]))
    with pytest.raises(UserError, match="12 tokens were given, but the model's block_size is 11"):
        model(torch.zeros(1, 12, dtype=torch.long))


def test_no_position_sees_a_later_one() -> None:
    model = small()
    idx = torch.randint(0, 37, (1, 9))
    before, _ = model(idx)
    idx[0, 5] = (idx[0, 5] + 1) % 37
    after, _ = model(idx)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("sizes", [{}, {"n_head": 1}, {"n_layer": 1, "vocab_size": 5}])
def test_equal_logits_as_the_decoder(sizes: dict[str, int]) -> None:
    model = small(**sizes)
    decoder = to_decoder(model)
    idx = torch.randint(0, model.sizes["vocab_size"], (3, 11))
    ours, _ = model(idx)
    assert torch.allclose(decoder(idx), ours, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in decoder.parameters()) == sum(
        p.numel() for p in model.parameters()
    )
    with torch.no_grad():
        decoder.head.weight.zero_()  # a copy: the GPT stays as it was
    assert model.head.weight.ne(0).any()


def test_saved_as_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = SimpleTokenizer("the quick brown fox\njumps over the lazy dog. 日本語")
    model = small(vocab_size=tokenizer.vocab_size)
    save_folder(to_decoder(model), tokenizer.to_tokenizer(), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    idx = torch.tensor([tokenizer.encode("lazy fox 本")])
    expected, _ = model(idx)
    assert theirs.config.activation_function == "gelu" and not theirs.config.tie_word_embeddings
    assert torch.allclose(theirs(idx).logits, expected, atol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "model")("lazy fox 本").input_ids
        == idx[0].tolist()
    )
    ours, ours_tokenizer = load_folder(tmp_path / "model")
    assert ours_tokenizer is not None and ours_tokenizer.encode("lazy fox 本") == idx[0].tolist()
    assert torch.allclose(ours(idx), expected, atol=1e-5)


def test_greedy_generation_is_the_forward_step_by_step() -> None:
    model = small()
    idx = torch.randint(0, 37, (2, 4))
    out = model.generate(idx, max_new_tokens=15, temperature=0)
    assert out.shape == (2, 19) and torch.equal(out[:, :4], idx)
    for t in range(4, 19):  # the window slides when the text outgrows block_size
        logits, _ = model(out[:, max(0, t - 11) : t])
        assert torch.equal(logits[:, -1].argmax(-1), out[:, t])
    assert torch.equal(model.generate(idx, 0), idx)


def test_sampling_follows_the_seed_and_top_k() -> None:
    model = small()
    idx = torch.randint(0, 37, (3, 4))
    torch.manual_seed(5)
    first = model.generate(idx, 8, temperature=1.5, top_k=3)
    torch.manual_seed(5)
    assert torch.equal(model.generate(idx, 8, temperature=1.5, top_k=3), first)
    assert not torch.equal(model.generate(idx, 8, temperature=1.5, top_k=3), first)
    for t in range(4, 11):
        logits, _ = model(first[:, :t])
        best = logits[:, -1].topk(3).indices
        assert (best == first[:, t : t + 1]).any(-1).all()
    assert torch.equal(model.generate(idx, 5, top_k=1), model.generate(idx, 5, temperature=0.0))
    assert model.generate(idx, 2, top_k=1000).shape == (3, 6)


def test_generation_switches_dropout_off_and_on_again() -> None:
    model = small().train()
    idx = torch.randint(0, 37, (1, 4))
    out = model.generate(idx, 6, temperature=0)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(model.eval().generate(idx, 6, temperature=0), out)
    assert not model.training


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -3}, "top_k is -3"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, "no prompt"),
    ],
)
def test_generation_asked_wrongly(change: dict, said: str) -> None:
    arguments = {"idx": torch.zeros(1, 2, dtype=torch.long), "max_new_tokens": 1, **change}
    with pytest.raises(UserError, match=said):
        small().generate(**arguments)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"n_head": 5}, r"n_embd \(24\) is not a multiple of n_head \(5\)"),
        ({"n_head": 0}, "n_head is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        small(**sizes)


def test_config_defaults() -> None:
    assert dataclasses.asdict(GPTConfig()) == {
        "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "block_size": 1024,
        "dropout": 0.1, "batch_size": 8, "learning_rate": 6e-4, "weight_decay": 0.1,
        "max_steps": 100000, "warmup_steps": 2000, "gradient_accumulation_steps": 4,
        "grad_clip": 1.0, "use_amp": True, "eval_interval": 500, "eval_steps": 50,
        "save_interval": 5000,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"no setting 'n_layers'\. Did you mean 'n_layer'\?"):
        GPTConfig(n_layers=3)


def test_config_size_is_exact() -> None:
    assert GPTConfig().get_model_size() == pytest.approx(163.037184)
    config = GPTConfig(vocab_size=37, n_embd=24, n_layer=3, n_head=4, block_size=11, dropout=0.0)
    model = GPT.from_config(config)
    assert config.get_model_size() == sum(p.numel() for p in model.parameters()) / 1e6
    assert model.sizes["n_head"] == 4 and model.sizes["dropout"] == 0.0


def test_sampler_is_the_projects_own() -> None:
    """`generate` has no sampling arithmetic of its own to go wrong."""
    import llm_from_scratch.gpt.model as module

    assert module.SamplingSettings is SamplingSettings
    assert "multinomial" not in inspect.getsource(module)


def test_short_enough_to_read() -> None:
    folder = Path(package.__file__ or "").parent
    files = [folder / "model.py", folder / "config.py"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 300
