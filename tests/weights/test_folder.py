"""Model folders: what is written, what is read, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import ModelConfig, RopeScaling
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.families import family_of, read_config
from llm_from_scratch.weights.folder import load_folder, save_folder
from tests.model.references_seq2seq import make_seq2seq

Make = Callable[..., Decoder]
TOKENS = torch.arange(30)[None] * 7 % 251


@pytest.fixture(params=["gpt2", "llama", "qwen3"])
def saved(
    request: pytest.FixtureRequest, make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> tuple[Decoder, Path]:
    model = make_model(request.param, n_kv_heads=None if request.param == "gpt2" else 2)
    save_folder(model, tokenizer, tmp_path / "model")
    return model, tmp_path / "model"


def change_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(values), encoding="utf-8")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip(saved: tuple[Decoder, Path], tokenizer: Tokenizer) -> None:
    model, folder = saved
    back, read = load_folder(folder)
    assert not back.training
    assert back.config == model.config
    for (name, mine), theirs in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert back.head.weight is back.embedding.weight
    assert read is not None and read.encode("in the") == tokenizer.encode("in the")
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


def test_transformers_reads_all_of_it(saved: tuple[Decoder, Path], tokenizer: Tokenizer) -> None:
    model, folder = saved
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
        torch.testing.assert_close(model(TOKENS), wanted, atol=1e-5, rtol=0)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    assert theirs.config.bos_token_id == tokenizer.bos_id
    auto = AutoTokenizer.from_pretrained(folder)
    assert auto.encode("in the", add_special_tokens=False) == tokenizer.encode("in the")
    assert auto.eos_token_id == tokenizer.eos_id
    assert auto.chat_template == tokenizer.chat_template


def test_shards_both_ways(make_model: Make, tmp_path: Path) -> None:
    model = make_model(tie_embeddings=False)
    save_folder(model, None, tmp_path / "model", shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("model-0000*-of-0000*.safetensors"))) > 2
    back, tokenizer = load_folder(tmp_path / "model")
    assert tokenizer is None
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(back(TOKENS), model(TOKENS))
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    again, _ = load_folder(tmp_path / "theirs")
    assert torch.equal(again.head.weight, model.head.weight)


def test_generation_config_is_extended(
    make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.extra_stop_ids.add(1)
    save_folder(make_model(), tokenizer, tmp_path / "m", {"temperature": 0.5})
    values = json.loads((tmp_path / "m" / "generation_config.json").read_text(encoding="utf-8"))
    assert values == {
        "bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 0, "temperature": 0.5,
    }  # fmt: skip
    _, back = load_folder(tmp_path / "m")
    assert back is not None and back.stop_ids == {1, 2}


def test_end_of_turn_ids_of_config_json_are_stop_ids(
    make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_folder(make_model(), tokenizer, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    change_json(tmp_path / "m" / "config.json", eos_token_id=[1, 2])
    _, back = load_folder(tmp_path / "m")
    assert back is not None and back.stop_ids == {1, 2}


def test_precision(make_model: Make, tmp_path: Path) -> None:
    save_folder(make_model().bfloat16(), None, tmp_path / "m")
    assert load_folder(tmp_path / "m")[0].embedding.weight.dtype == torch.bfloat16
    assert load_folder(tmp_path / "m", torch.float32)[0].head.weight.dtype == torch.float32
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"


def test_base_model_folders_and_leftover_buffers(make_model: Make, tmp_path: Path) -> None:
    """openai-community/gpt2 has no `transformer.` and carries its causal masks."""
    model = make_model("gpt2")
    save_folder(model, None, tmp_path / "m")

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()

    change_tensors(tmp_path / "m", strip)
    back, _ = load_folder(tmp_path / "m")
    assert torch.equal(back(TOKENS), model(TOKENS))


def test_the_older_rope_fields(make_model: Make, tmp_path: Path) -> None:
    save_folder(make_model(), None, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["rope_parameters"]
    values["rope_theta"] = 777.0
    scaling = {"factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0}
    values["rope_scaling"] = {
        "type": "llama3", "original_max_position_embeddings": 16, **scaling,
    }  # fmt: skip
    path.write_text(json.dumps(values), encoding="utf-8")
    config = load_folder(tmp_path / "m")[0].config
    assert config.rope_theta == 777.0
    assert config.rope_scaling == RopeScaling(original_max_seq_len=16, **scaling)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()(TOKENS).logits
    with torch.no_grad():
        ours = load_folder(tmp_path / "m")[0](TOKENS)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"model_type": "llamma"}, "'model_type' is 'llamma'.*Did you mean 'llama'"),
        ("llama", {"model_type": None}, "'model_type' is None"),
        ("llama", {"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ("llama", {"hidden_act": "xielu"}, "'hidden_act' is 'xielu'"),
        ("llama", {"hidden_size": 24.5}, "'hidden_size' is 24.5"),
        ("llama", {"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
        ("llama", {"num_key_value_heads": 3}, "'num_attention_heads' is 4.*multiple of"),
        ("llama", {"head_dim": 5}, "'head_dim' is 5; it must be even"),
        ("llama", {"max_position_embeddings": 1 << 40}, "'max_position_embeddings'"),
        ("llama", {"rms_norm_eps": "small"}, "'rms_norm_eps' is 'small'"),
        ("llama", {"attention_bias": "no"}, "'attention_bias' is 'no'"),
        ("llama", {"attention_dropout": 1.5}, "'attention_dropout' is 1.5; it must be below 1"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: 'rope_type'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: 'type' is"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters: 'factor' is No"),
        ("llama", {"rope_parameters": {"full": {"rope_theta": 1.0}}}, "'rope_parameters' is"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_interleaved": True}, "'rope_interleaved' is True"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": 1}}, "mscale"),
        ("llama", {"sliding_window": 8}, "the field 'sliding_window'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "at least 1"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": -1, "layer_types": None,
                   "sliding_window": 8}, "'max_window_layers' is -1"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "'layer_types'"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types'"),
        ("qwen3", {"mlp_bias": True}, "'mlp_bias' is True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx'"),
        ("gpt2", {"scale_attn_weights": False}, "'scale_attn_weights' is False"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True"),
        ("gpt2", {"n_head": 5}, "'n_embd' is 24; it must be a multiple of 'n_head'"),
        ("gpt2", {"is_encoder_decoder": True}, "'is_encoder_decoder' is True"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_expressed_names_its_field(
    family: str, changes: dict[str, Any], words: str, make_model: Make, tmp_path: Path
) -> None:
    save_folder(make_model(family), None, tmp_path / "m")
    change_json(tmp_path / "m" / "config.json", **changes)
    (tmp_path / "m" / "model.safetensors").unlink()  # it is refused before weights are looked at
    with pytest.raises(UserError, match=words) as caught:
        load_folder(tmp_path / "m")
    assert "config.json" in str(caught.value)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_folder(folder)
    assert str(folder) in str(caught.value)


def test_folders_that_are_not_whole(make_model: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    refused(folder, "no model folder")
    save_folder(make_model(), tokenizer, folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused(folder, "truncated or not a safetensors file")
    weights.unlink()
    refused(folder, r"has no model\.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, "a pickle, .*scratchlm convert")
    (folder / "pytorch_model.bin").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text("{}", encoding="utf-8")
    refused(folder, "no 'weight_map'")
    index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}', encoding="utf-8")
    refused(folder, "not a shard's name")
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}', encoding="utf-8")
    refused(folder, "model-1.safetensors', which is missing")
    (folder / "config.json").write_text('{"model_type":\n "llama",,}', encoding="utf-8")
    refused(folder, "line 2 is not valid JSON")
    (folder / "config.json").write_text("[]", encoding="utf-8")
    refused(folder, "must hold a JSON object")
    (folder / "config.json").unlink()
    refused(folder, r"config\.json")


def test_tensors_that_do_not_fit(make_model: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model = make_model()
    name = "model.layers.1.mlp.up_proj.weight"
    for change, words in (
        (lambda t: t.pop(name), f"lacks 1 tensor.*'{name}'"),
        (lambda t: t.update(extra=torch.ones(2)), "does not ask for, such as 'extra'"),
        (lambda t: t.update({name: t[name][:, :-1].contiguous()}), f"'{name}' has the shape"),
        (lambda t: t.update({name: t[name].to(torch.int8)}), f"'{name}' holds torch.int8"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(270, 24)}), "tie_word_embeddings"),
    ):
        save_folder(model, tokenizer, folder)
        change_tensors(folder, change)
        refused(folder, words)
    same = {"lm_head.weight": model.embedding.weight.detach().clone()}
    save_folder(model, tokenizer, folder)
    change_tensors(folder, lambda t: t.update(same))
    load_folder(folder)  # said twice, but the same


@pytest.mark.parametrize("copy", ["lm_head.weight", "model.encoder.embed_tokens.weight"])
def test_copies_that_no_field_sets_apart(copy: str, tmp_path: Path) -> None:
    """BART has one matrix for everything: `tie_word_embeddings` cannot be set to false there."""
    make_seq2seq("bart").save_pretrained(tmp_path)
    same = load_file(tmp_path / "model.safetensors")["model.shared.weight"].clone()
    change_tensors(tmp_path, lambda t: t.update({copy: same}))
    load_folder(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({copy: same + 1}))
    refused(tmp_path, f"'{copy}' differs from 'model.shared.weight', but in bart the two are one")


def test_a_tensor_under_two_names(make_model: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An older name of a norm's weight beside the newer one: neither is left over by its name."""
    save_folder(make_model(), tokenizer, tmp_path / "m")
    change_tensors(tmp_path / "m", lambda t: t.update({"model.norm.gamma": torch.ones(24)}))
    refused(tmp_path / "m", r"the same tensor as 'model\.norm\.\w+' and as 'model\.norm\.\w+'")


def test_a_vocabulary_larger_than_the_model(
    make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    small = make_model(vocab_size=200)
    with pytest.raises(UserError, match="265 entries, but the model only 200"):
        save_folder(small, tokenizer, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    save_folder(small, None, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    refused(tmp_path / "m", "265 entries, but the model only 200")


def test_saving_never_deletes_what_is_not_a_model(make_model: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds 'thesis\.txt'"):
        save_folder(make_model(), None, tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(UserError, match="is a file"):
        save_folder(make_model(), None, tmp_path / "thesis.txt")
    save_folder(make_model(), None, tmp_path / "m")
    save_folder(make_model("gpt2"), None, tmp_path / "m")  # a model may replace a model
    assert load_folder(tmp_path / "m")[0].config.norm == "layer"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer_corpus/precious.txt", "holds 'tokenizer_corpus', which is no part"),
        ("1_Pooling/precious.txt", "holds '1_Pooling', which is no part"),
        ("tokenizer.notes", r"holds 'tokenizer\.notes', which is no part"),
        ("ja.model", r"holds 'ja\.model' but no config\.json"),
        ("target_vocab.json", r"holds 'target_vocab\.json' but no config\.json"),
    ],
)
def test_what_only_looks_like_a_part_of_a_model(
    name: str, words: str, make_model: Make, tmp_path: Path
) -> None:
    path = tmp_path / "m" / name
    path.parent.mkdir(parents=True)
    path.write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match=words):
        save_folder(make_model(), None, tmp_path / "m")
    assert path.read_text(encoding="utf-8") == "years of work"


def test_every_file_of_a_model_may_be_replaced(make_model: Make, tmp_path: Path) -> None:
    """Also the second vocabulary of a translator, and how an embedder pools."""
    save_folder(make_model(), None, tmp_path / "m")
    for name in ("target_vocab.json", "source.spm", "1_Pooling/config.json", "modules.json"):
        (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_text("{}", encoding="utf-8")
    save_folder(make_model(), None, tmp_path / "m")
    assert not (tmp_path / "m" / "target_vocab.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "sinusoidal"},
        {"norm": "layer"},
        {"gated": False},
        {"qk_norm": "head", "feed_forward_bias": True},
        {"n_heads": 5, "n_kv_heads": 5, "feed_forward_bias": True},  # 24 are not 5 heads' worth
        {"norm": "layer", "position": "learned", "gated": False},
    ],
)
def test_what_no_class_can_express_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "vocab_size": 9, "d_model": 24, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 6, "d_ff": 8, "max_seq_len": 8,
    }  # fmt: skip
    assert family_of(ModelConfig(**fields)).name == "llama"
    with pytest.raises(UserError, match="No Hugging Face class"):
        save_folder(Decoder(ModelConfig(**fields | changes)), None, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_index_that_contradicts_its_shards(
    make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    save_folder(make_model(), tokenizer, folder, shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text("utf-8"))
    table = values["weight_map"]
    first, last = min(table.values()), max(table.values())
    load_folder(folder)
    elsewhere = {name: last if shard == first else shard for name, shard in table.items()}
    for wrong in ({**table, "gone.weight": first}, {**elsewhere, "model.norm.weight": first}):
        index.write_text(json.dumps({**values, "weight_map": wrong}), "utf-8")
        refused(folder, "says that the tensor '.*' is in '.*', where it is not")


@pytest.mark.parametrize("kind", ["decoder", "pair"])
def test_matrices_that_are_not_one_although_the_config_says_so(
    kind: str, make_model: Make, tmp_path: Path
) -> None:
    if kind == "decoder":
        model: Any = make_model()
        part, name = model, "head"
    else:
        make_seq2seq("bart").save_pretrained(tmp_path / "bart")
        model = load_folder(tmp_path / "bart")[0]
        part, name = model.decoder, "embedding"
    own = getattr(part, name).weight.detach().clone()
    getattr(part, name).weight = torch.nn.Parameter(own)
    save_folder(model, None, tmp_path / "m")  # equal: another matrix in memory only
    load_folder(tmp_path / "m")
    own += 1
    with pytest.raises(UserError, match="another matrix than the embedding"):
        save_folder(model, None, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_windows_and_families_are_refused_by_their_names() -> None:
    """What halves to nothing, and what reads images, too."""
    for values, words in (
        ({"model_type": "modernbert", "local_attention": 1}, "'local_attention' is 1.*at least 2"),
        ({"model_type": "gemma3"}, "text and images.*'gemma3_text'"),
        ({"model_type": "gema2"}, "Did you mean 'gemma2'"),
    ):
        with pytest.raises(UserError, match=rf"^config\.json: .*{words}"):
            read_config(values, "config.json")
