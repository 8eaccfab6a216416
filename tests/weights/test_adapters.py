"""Adapters of the PEFT library, both ways: what they compute, how they learn, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.adapters import adapter_names, merged
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.lora import KINDS, LoraSettings, add_lora, layers_of
from llm_from_scratch.model.low_rank import Adapted
from llm_from_scratch.weights.adapter_config import CONFIG, TENSORS
from llm_from_scratch.weights.adapter_folder import about_adapter
from llm_from_scratch.weights.adapters import attach, layout_of
from llm_from_scratch.weights.adapters_write import save_adapter
from llm_from_scratch.weights.assemble import Model
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.folder_checks import heads_of
from llm_from_scratch.weights.layouts import put_together
from tests.model.references import make_reference
from tests.model.references_heads import make_headed
from tests.model.references_seq2seq import make_seq2seq

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BART = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
MPNET = ["attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"]
T5 = ["q", "k", "v", "o", "wi", "wo"]
DISTILBERT = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
# family -> (what PEFT is told it is for, the class's names of all linear layers in the blocks).
FAMILIES: dict[str, tuple[str, list[str]]] = {
    "llama": ("CAUSAL_LM", LLAMA), "mistral": ("CAUSAL_LM", LLAMA), "qwen2": ("CAUSAL_LM", LLAMA),
    "qwen3": ("CAUSAL_LM", LLAMA), "gemma2": ("CAUSAL_LM", LLAMA),
    "gemma3_text": ("CAUSAL_LM", LLAMA), "olmo2": ("CAUSAL_LM", LLAMA),
    "qwen3_moe": ("CAUSAL_LM", LLAMA[:4]),
    "gpt2": ("CAUSAL_LM", ["c_attn", "c_proj", "c_fc"]), "gpt_neox": ("CAUSAL_LM", NEOX),
    "t5": ("SEQ_2_SEQ_LM", T5), "bart": ("SEQ_2_SEQ_LM", BART), "marian": ("SEQ_2_SEQ_LM", BART),
    "bert": ("SEQ_CLS", BERT), "roberta": ("SEQ_CLS", BERT), "distilbert": ("SEQ_CLS", DISTILBERT),
    "mpnet": ("SEQ_CLS", MPNET), "modernbert": ("SEQ_CLS", ["Wqkv", "Wo", "Wi"]),
}  # fmt: skip
SETTINGS = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.0}
Adapter = tuple[Any, Path, Path]  # PEFT's model, the base's folder, the adapter's


def make_base(family: str) -> PreTrainedModel:
    """A reference with matrices so small that sums of fp32 can be compared to 1e-5."""
    match FAMILIES[family][0]:
        case "SEQ_2_SEQ_LM":
            model = make_seq2seq(family)
        case "SEQ_CLS":
            model = make_headed(family, "classification")
        case _:
            model = make_reference(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_positions" not in name:  # Marian's are sines
                parameter.mul_(0.4)
    return model


def adapt_theirs(family: str, folder: Path, **settings: Any) -> Adapter:
    """A random adapter by PEFT, saved beside its base."""
    task, names = FAMILIES[family]
    theirs = make_base(family)
    theirs.save_pretrained(folder / "base")
    chosen = {"target_modules": names, "task_type": task, **SETTINGS, **settings}
    model = peft.get_peft_model(theirs, peft.LoraConfig(**chosen))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                drawn = torch.empty(parameter.shape).normal_(generator=generator) * 0.1
                parameter.copy_(parameter * (1 + drawn) if "magnitude" in name else drawn)
    model.save_pretrained(str(folder / "adapter"))
    return model.eval(), folder / "base", folder / "adapter"


def load_ours(base: Path, adapter: Path | None = None) -> Any:
    model, _ = load_folder(base, torch.float32)
    if adapter is not None:
        attach(model, adapter)
    return model


def asked(task: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(5, 60, (2, 11), generator=generator)
    if task != "SEQ_2_SEQ_LM":
        return {"input_ids": tokens}
    target = torch.randint(5, 60, (2, 7), generator=generator)
    return {"input_ids": tokens, "decoder_input_ids": target}


def logits_of(model: Any, family: str) -> torch.Tensor:
    batch = asked(FAMILIES[family][0])
    if isinstance(model, torch.nn.Module) and hasattr(model, "peft_config"):
        return model(**batch).logits
    return model(*batch.values())


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    """A cross-entropy whose targets are whatever comes first."""
    targets = torch.arange(logits.shape[:-1].numel()) % logits.shape[-1]
    return F.cross_entropy(logits.flatten(0, -2), targets)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, what: str = "") -> None:
    error = (got - wanted).abs().max().item()
    assert error <= 1e-5 * max(1.0, wanted.abs().max().item()), f"{what}: {error}"


# Every kind on some families, one of them on each of the others.
CASES = [
    (family, kind)
    for number, family in enumerate(FAMILIES)
    for kind in (KINDS if family in ("llama", "gpt2", "bert") else [KINDS[number % 3]])
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_computes_and_learns_what_peft_does(family: str, kind: str, tmp_path: Path) -> None:
    changes = {"use_rslora": kind == "rslora", "use_dora": kind == "dora"}
    theirs, base, adapter = adapt_theirs(family, tmp_path, **changes)
    ours = load_ours(base, adapter)
    wanted, got = logits_of(theirs, family), logits_of(ours, family)
    assert_close(got, wanted, "logits")
    loss, their_loss = loss_of(got), loss_of(wanted)
    assert_close(loss, their_loss, "loss")
    loss.backward()
    their_loss.backward()
    compare_gradients(ours, theirs)
    with torch.no_grad():
        assert_close(logits_of(merged(ours), family), wanted, "merged")
    # And back: PEFT computes the same with what we write.
    save_adapter(ours, tmp_path / "ours", str(base))
    again = peft.PeftModel.from_pretrained(type(make_base(family)).from_pretrained(base),
                                           tmp_path / "ours").eval()  # fmt: skip
    assert_close(logits_of(again, family), wanted, "written")
    values = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (values["r"], values["lora_alpha"]) == (3, 7) and not values["rank_pattern"]
    assert (values["use_rslora"], values["use_dora"]) == (kind == "rslora", kind == "dora")


def compare_gradients(ours: Model, theirs: Any) -> None:
    """Of every adapter; what a class keeps in one matrix is put together first."""
    found = dict(theirs.named_parameters())
    compared = []
    for module, entry in layout_of(ours).modules.items():
        parts = [layer_named(ours, name.removesuffix(".weight")) for name in entry.ours]
        adapters: list[Any] = [part.named("default") for part in parts if part is not None]
        if not adapters or adapters[0] is None:
            continue
        rows = replace(entry, layout="by_head" if entry.layout == "by_head" else "plain")
        got = {
            "lora_A.default.weight": sum(one.a.grad for one in adapters),
            "lora_B.default.weight": put_together(
                rows, [one.b.grad for one in adapters], heads_of(ours.config)
            ),
        }
        if adapters[0].lengths is not None:
            got["lora_magnitude_vector.default.weight"] = put_together(
                rows, [one.lengths.grad for one in adapters], heads_of(ours.config)
            )
        for name, gradient in got.items():
            wanted = found[f"base_model.model.{module}.{name}"].grad
            compared.append((gradient, wanted))
    # Sums over all positions cancel: errors are of the size of the summands.
    largest = max(wanted.abs().max().item() for _, wanted in compared)
    for gradient, wanted in compared:
        assert (gradient - wanted).abs().max().item() <= 1e-5 * largest
    assert len(compared) >= 8


def layer_named(model: Model, name: str) -> Adapted | None:
    layer = layers_of(model).get(name)
    return layer if isinstance(layer, Adapted) else None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "modernbert"])
def test_adapters_of_our_own_load_in_peft(family: str, tmp_path: Path) -> None:
    """Separate A matrices of queries, keys and values become one detour of a fused matrix."""
    make_base(family).save_pretrained(tmp_path / "base")
    ours = load_ours(tmp_path / "base")
    add_lora(ours, LoraSettings(rank=2, alpha=3), seed=1)
    scramble(ours)
    save_adapter(ours, tmp_path / "ours", str(tmp_path / "base"))
    base = type(make_base(family)).from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert_close(logits_of(ours, family), logits_of(theirs, family))
    again = load_ours(tmp_path / "base", tmp_path / "ours")
    assert_close(logits_of(again, family), logits_of(ours, family))


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_fused_matrix(kind: str, tmp_path: Path) -> None:
    make_base("gpt2").save_pretrained(tmp_path / "base")
    ours = load_ours(tmp_path / "base")
    add_lora(ours, LoraSettings(rank=2, kind=kind, targets=("attention.v", "up")), seed=1)
    scramble(ours)
    save_adapter(ours, tmp_path / "ours", str(tmp_path / "base"))
    base = type(make_base("gpt2")).from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert_close(logits_of(ours, "gpt2"), logits_of(theirs, "gpt2"))


def scramble(model: Model) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name and not name.endswith("lengths"):
                parameter.copy_(torch.empty(parameter.shape).normal_(generator=generator) * 0.2)


def test_embeddings_head_ranks_and_alphas_of_their_own(tmp_path: Path) -> None:
    theirs, base, adapter = adapt_theirs(
        "llama", tmp_path, target_modules=["q_proj", "embed_tokens", "lm_head", "down_proj"],
        rank_pattern={"q_proj": 5, "layers.1.mlp.down_proj": 2},
        alpha_pattern={"^q_proj": 3, "down_proj$": 11},
    )  # fmt: skip
    ours = load_ours(base, adapter)
    assert_close(logits_of(ours, "llama"), logits_of(theirs, "llama"))
    assert_close(logits_of(merged(ours), "llama"), logits_of(theirs, "llama"))
    save_adapter(ours, tmp_path / "ours", str(base))
    loaded = type(make_base("llama")).from_pretrained(base)
    again = peft.PeftModel.from_pretrained(loaded, tmp_path / "ours").eval()
    assert_close(logits_of(again, "llama"), logits_of(theirs, "llama"))


def test_a_tied_embedding_is_untied_by_merging(tmp_path: Path) -> None:
    make_base("gemma2").save_pretrained(tmp_path / "base")
    ours = load_ours(tmp_path / "base")
    assert ours.config.tie_embeddings
    add_lora(ours, LoraSettings(rank=2, targets=("embedding", "q")), seed=1)
    scramble(ours)
    wanted = logits_of(ours, "gemma2")
    plain = merged(ours)
    assert not plain.config.tie_embeddings and ours.config.tie_embeddings
    assert_close(logits_of(plain, "gemma2"), wanted)
    save_folder(ours, None, tmp_path / "merged")
    assert_close(logits_of(load_ours(tmp_path / "merged"), "gemma2"), wanted)


def test_a_classifier_comes_with_its_adapter(tmp_path: Path) -> None:
    theirs, base, adapter = adapt_theirs("bert", tmp_path)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    theirs.save_pretrained(str(adapter))
    ours = load_ours(base, adapter)
    assert_close(logits_of(ours, "bert"), logits_of(theirs, "bert"))
    trained = [n for n, p in ours.named_parameters() if p.requires_grad and "adapters" not in n]
    assert {name.partition(".")[0] for name in trained} == {"out", "backbone"}  # and the pooler
    assert about_adapter(adapter).labels == ours.out.out_features
    with pytest.raises(UserError, match="would change the base for all adapters"):
        attach(load_ours(base), adapter, "other", alone=False)


def test_several_adapters_beside_each_other(tmp_path: Path) -> None:
    _, base, adapter = adapt_theirs("llama", tmp_path)
    ours = load_ours(base, adapter)
    attach(ours, adapter, "second", alone=False)
    assert adapter_names(ours) == ["default", "second"]
    save_adapter(ours, tmp_path / "second", name="second")
    with pytest.raises(UserError, match="no adapter 'third' to save"):
        save_adapter(ours, tmp_path / "third", name="third")


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stored")
    _, base, adapter = adapt_theirs("llama", folder)
    return base, adapter


def changed(adapter: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the adapter with another config."""
    folder.mkdir()
    values = json.loads((adapter / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(values))
    (folder / TENSORS).write_bytes((adapter / TENSORS).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("peft_type", "IA3", "'peft_type' is 'IA3'; it must be LORA"),
        ("lora_bias", True, "the field 'lora_bias' (True) is not supported"),
        ("use_dorra", True, "Did you mean 'use_dora'?"),
        ("layer_replication", [[0, 2]], "the field 'layer_replication'"),
        ("bias", "all", "'bias' is 'all'; it must be none"),
        ("init_lora_weights", "pissa", "'init_lora_weights' is 'pissa'"),
        ("lora_alpha", "many", "'lora_alpha' is 'many'; it must be"),
        ("lora_alpha", True, "'lora_alpha' is True; it must be"),
        ("r", 0, "'r' is 0; it must be"),
        ("alpha_pattern", {"(a+)+$": 1}, "'alpha_pattern' is"),
        ("alpha_pattern", {"q_proj": None}, "'alpha_pattern' is"),
        ("alpha_pattern", {"q_proj\\": 1}, "'alpha_pattern' is"),
        ("use_rslora", "true", "'use_rslora' is 'true'; it must be true or false"),
        ("use_dora", 1, "'use_dora' is 1; it must be true or false"),
        ("use_dora", True, "has no tensor 'lengths'"),
        ("base_model_name_or_path", 3, "'base_model_name_or_path' is 3"),
    ],
)
def test_other_settings_are_refused(
    stored: tuple[Path, Path], tmp_path: Path, field: str, value: Any, said: str
) -> None:
    base, adapter = stored
    folder = changed(adapter, tmp_path / "changed", lambda values: values.update({field: value}))
    with pytest.raises(UserError) as caught:
        attach(load_ours(base), folder)
    assert said in str(caught.value) and str(folder) in str(caught.value)


def test_broken_tensors_are_refused(stored: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = stored
    tensors = load_file(adapter / TENSORS)
    first = next(name for name in tensors if "lora_A" in name)
    folder = changed(adapter, tmp_path / "changed", lambda values: None)
    other = {name.replace("q_proj", "q_prjo"): t for name, t in tensors.items()}
    broken: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "shape": ({**tensors, first: torch.zeros(3, 5)}, "does not fit the layer"),
        "axes": ({**tensors, first: torch.zeros(3)}, "does not fit the layer"),
        "rank": ({**tensors, first: torch.zeros(0, 48)}, "does not fit the layer"),
        "missing": ({k: t for k, t in tensors.items() if k != first}, "has no tensor 'a'"),
        "foreign": (other, "belongs to no layer of this model"),
        "integers": ({**tensors, first: torch.zeros(3, 48, dtype=torch.int8)}, "torch.int8"),
        "empty": ({"base_model.model.lm_head.weight": torch.zeros(71, 48)}, "holds no adapter"),
    }  # fmt: skip
    for what, (values, said) in broken.items():
        save_file(values, folder / TENSORS)
        with pytest.raises(UserError, match=said):
            attach(load_ours(base), folder)
            pytest.fail(what)
    (folder / TENSORS).write_bytes(b"\x10\x00\x00")
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        attach(load_ours(base), folder)
    (folder / TENSORS).unlink()
    with pytest.raises(UserError, match="the folder is incomplete"):
        attach(load_ours(base), folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="only a pickle"):
        attach(load_ours(base), folder)


def test_nothing_is_changed_by_an_adapter_that_is_refused(
    stored: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = stored
    folder = changed(adapter, tmp_path / "changed", lambda values: None)
    tensors = load_file(adapter / TENSORS)
    last = [name for name in tensors if "lora_A" in name][-1]
    save_file({**tensors, last: torch.zeros(3, 5)}, folder / TENSORS)
    ours = load_ours(base)
    with pytest.raises(UserError):
        attach(ours, folder)
    assert not adapter_names(ours) and all(p.requires_grad for p in ours.parameters())


def test_a_dora_of_an_embedding_changes_nothing(tmp_path: Path) -> None:
    _, base, adapter = adapt_theirs(
        "llama", tmp_path, use_dora=True, target_modules=["q_proj", "embed_tokens"]
    )
    ours = load_ours(base)
    before = logits_of(ours, "llama")
    with pytest.raises(UserError, match=r"of 'model\.embed_tokens' is a DoRA of an embedding"):
        attach(ours, adapter)
    assert not adapter_names(ours) and all(p.requires_grad for p in ours.parameters())
    assert torch.equal(logits_of(ours, "llama"), before)


def test_layers_trained_whole_fit_all_or_none(tmp_path: Path) -> None:
    _, base, adapter = adapt_theirs("llama", tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    tensors = load_file(adapter / TENSORS)
    whole = [name for name in tensors if "lora" not in name]
    assert len(whole) == 2
    tensors[whole[0]] = tensors[whole[0]] + 1
    tensors[whole[1]] = torch.zeros(3, 5)
    save_file(tensors, adapter / TENSORS)
    ours = load_ours(base)
    before = logits_of(ours, "llama")
    with pytest.raises(UserError, match=r"has the shape \(3, 5\)"):
        attach(ours, adapter)
    assert torch.equal(logits_of(ours, "llama"), before) and not adapter_names(ours)


def test_another_folder_is_left_alone(stored: tuple[Path, Path], tmp_path: Path) -> None:
    ours = load_ours(*stored)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds 'thesis\.txt'"):
        save_adapter(ours, tmp_path / "mine")
    assert isinstance(ours, torch.nn.Module) and not isinstance(ours, EncoderDecoder)
