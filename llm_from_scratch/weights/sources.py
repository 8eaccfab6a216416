"""What a MODEL argument means: a folder, a run, a .gguf file, a hub name or a short name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from llm_from_scratch.core.config import from_dict, read_yaml
from llm_from_scratch.core.device import PRECISIONS, pick_device
from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.core.freed import give_back
from llm_from_scratch.model.heads import Head
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.adapter_config import CONFIG, TENSORS, is_adapter_folder
from llm_from_scratch.weights.adapter_folder import (
    AboutAdapter,
    about_adapter,
    find_adapter,
    tokenizer_with,
    with_problem,
)
from llm_from_scratch.weights.adapters import attach
from llm_from_scratch.weights.assemble import Model, complete, empty_model, put
from llm_from_scratch.weights.catalogue import CATALOGUE, Report, local_path, pull, to_stderr
from llm_from_scratch.weights.config_json import check_sizes
from llm_from_scratch.weights.folder import is_model_folder, load_folder
from llm_from_scratch.weights.gguf_load import load_gguf
from llm_from_scratch.weights.heads import Labels, add_head
from llm_from_scratch.weights.pickles import SUFFIXES, pickle_files
from llm_from_scratch.weights.stored import open_tensors

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
STEP = re.compile(r"step-[0-9]+")
# What a hub folder needs; never a pickle, never another framework's copy of the weights.
HUB_FILES = [
    "*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model", "*.spm", "LICENSE*",
]  # fmt: skip
# What `convert` fetches where a hub folder has no safetensors; nothing else asks for a pickle.
HUB_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
# Of what lies in folders of its own only 1_Pooling, which says how an encoder makes embeddings.
HUB_NOT = ["[!1]*/*", "1[!_]*/*"]
STORED = "stored"  # a dtype: whatever the file has
# By our names and by PyTorch's.
DTYPES = {
    name: dtype
    for short, dtype in PRECISIONS.items()
    for name in (short, str(dtype).removeprefix("torch."))
}


def locate(model: str | Path, report: Report = to_stderr, *, pickles: bool = False) -> Path:
    """The folder or .gguf file on this machine that MODEL names, fetched first where necessary.

    In a run folder that is its `model/`, or its newest checkpoint while there is no model yet.
    With `pickles`, of a hub name those are fetched where it has no safetensors.
    Raises `UserError` with the nearest name for what does not exist.
    """
    name, path = _named(model)
    if path.is_dir():
        return _inside(path)
    if path.is_file():
        return _known_file(path)
    if name in CATALOGUE:
        found = local_path(name)
        return found if found is not None else pull(name, report)
    if is_hub_name(model):
        folder = _from_hub(name)
        if pickles and not any(folder.glob("*.safetensors")):
            folder = _from_hub(name, [*HUB_FILES, *HUB_PICKLES])
            if not pickle_files(folder):
                raise UserError(
                    f"The hub's '{name}' has its weights neither as safetensors nor as "
                    "pytorch_model.bin; take another model, or a GGUF file of this one."
                )
        return folder
    if path.exists():
        raise UserError(f"{name} is neither a folder nor an ordinary file; name a model's folder.")
    if path.parent.is_dir() and path.parent != Path():
        siblings = [str(path.parent / entry.name) for entry in path.parent.iterdir()]
        raise UserError(f"There is no model at {name}.{nearest(name, siblings)}")
    here = [entry.name for entry in Path().iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    raise UserError(
        f"There is no model '{name}': it is not a folder, a .gguf file, or a name that `scratchlm "
        f"models` lists.{nearest(name, [*CATALOGUE, *here])}"
    )


def is_hub_name(model: str | Path) -> bool:
    """Whether MODEL is `org/name`, and nothing on this machine or in the catalogue is called so."""
    name, path = str(model), Path(model).expanduser()
    here = path.exists() or path.parent.is_dir() or name in CATALOGUE
    return HUB_NAME.fullmatch(name) is not None and not here


def _named(model: str | Path) -> tuple[str, Path]:
    """MODEL as a name and as a path; an empty one would be the current folder."""
    if model == "":
        raise UserError("MODEL is empty; name a model folder, a .gguf file or a model.")
    return str(model), Path(model).expanduser()


def locate_description(model: str | Path, report: Report = to_stderr) -> Path:
    """The config.json, .gguf file or run's config.yaml that says what MODEL is; of an adapter its
    adapter_config.json.

    Of a hub name nothing else is fetched. A run is described before it has a model or checkpoint.
    """
    _, path = _named(model)
    if path.is_dir():
        run = path.parent.parent if _is_checkpoint(path) else path
        for name in ("config.json", CONFIG, "model/config.json", "config.yaml"):
            if (run / name).is_file():
                return run / name
    if path.is_file() and (path.name == "config.json" or path.suffix in (".yaml", ".yml")):
        return path
    if is_hub_name(model):
        found = _from_hub(str(model), ["config.json", CONFIG, TENSORS])
    else:
        found = locate(model, report)
    if found.is_dir():
        adapter = is_adapter_folder(found) and not is_model_folder(found)
        found /= CONFIG if adapter else "config.json"
    return found


def _inside(folder: Path) -> Path:
    if is_model_folder(folder):
        return folder
    if is_adapter_folder(folder):
        return folder
    if is_model_folder(folder / "model"):
        return folder / "model"
    if _is_checkpoint(folder):
        return folder
    steps = [path for path in (folder / "checkpoints").glob("step-*") if _is_checkpoint(path)]
    if steps:
        return max(steps, key=lambda p: int(p.name.removeprefix("step-")))
    files = sorted(folder.glob("*.gguf"))
    if files:
        raise UserError(f"{folder} holds GGUF files; name one of them, such as {files[0]}.")
    if any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(
            f"The run in {folder} has no model and no checkpoint yet. Go on with it: "
            f"scratchlm pretrain --out {folder} --resume"
        )
    raise UserError(f"{folder} is not a model folder (no config.json) nor a run folder.")


def _is_checkpoint(folder: Path) -> bool:
    return bool(STEP.fullmatch(folder.name)) and (folder / "state.json").is_file()


def _known_file(path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.suffix == ".safetensors":
        raise UserError(f"{path} holds weights alone; name its folder, {path.parent}, instead.")
    if path.suffix in SUFFIXES:
        raise UserError(
            f"{path} is a pickle, which can run any program when it is opened; turn it into a "
            f"model folder once, which runs nothing: scratchlm convert {path} --to hf --out NEW"
        )
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return path
    raise UserError(f"{path} is not a model; name a model folder or a .gguf file.")


def _from_hub(name: str, files: Sequence[str] = HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    no_folder = f"There is no folder '{name}' here"
    try:
        return Path(snapshot_download(name, allow_patterns=[*files], ignore_patterns=HUB_NOT))
    except GatedRepoError as error:
        raise UserError(
            f"The hub gives '{name}' only to those who accepted its terms; accept them on its page "
            "and log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{no_folder}, and the hub has no public model of that name.{nearest(name, CATALOGUE)}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{no_folder}, and the hub cannot be reached. Check the name and the network, or use "
            "a local model or one that `scratchlm models` lists."
        ) from error


def _load_checkpoint(folder: Path, device: torch.device) -> tuple[Model, Tokenizer]:
    """The weights of a run that has not saved a model yet: what config.yaml describes."""
    run = folder.parent.parent
    values = read_yaml(run / "config.yaml")
    tokenizer = Tokenizer.load(run / "tokenizer")
    settings = from_dict(ModelSettings, values.get("model") or {}, "model")
    data = values.get("data")
    seq_len = data.get("seq_len") if isinstance(data, dict) else None
    if not isinstance(seq_len, int):
        raise UserError(f"{run / 'config.yaml'} has no whole number as data.seq_len.")
    config = resolve(settings, tokenizer.vocab_size, seq_len)
    # The file may be anybody's: the same limits as for the numbers of a config.json.
    check_sizes(config, str(run / "config.yaml"))
    give_back()
    model = empty_model(config)
    with torch.no_grad(), open_tensors(folder) as tensors:
        for name, parameter in list(model.named_parameters()):
            if name not in tensors.files or tensors.shape(name) != tuple(parameter.shape):
                raise UserError(f"The checkpoint {folder} does not fit {run / 'config.yaml'}.")
            put(model, name, tensors.read(name).to(device, copy=True))
    complete(model, device)
    return model, tokenizer


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is quicker than fp32 for inference here, by what the hardware says of itself.

    A CPU without bf16 instructions decodes quicker in bf16 (half the bytes), but takes several
    times as long to read a prompt.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type == "cpu":
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(supported()) if supported is not None else False
    return False


def slow_halves(folder: Path, device: torch.device) -> bool:
    """Whether all weights in `folder` are stored in a half precision that is slow here."""
    try:
        with open_tensors(folder) as tensors:
            kinds = {file.get_slice(name).get_dtype() for name, file in tensors.files.items()}
    except UserError:
        return False  # said when it is loaded
    return kinds == {"F16"} or (kinds <= {"F16", "BF16"} and not computes_bf16(device))


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype given by name ("fp32", "bf16", ...) or as it is."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(
                f"There is no dtype '{dtype}'; use one of {', '.join(DTYPES)}."
                + nearest(dtype, DTYPES)
            )
        return DTYPES[dtype]
    return dtype


def _under_head(model: Model, head: str | None, labels: Labels) -> Model:
    """A model from a file that knows no heads, under the one that is asked for."""
    if head in (None, "none") or isinstance(model, Head):
        return model
    return add_head(model, str(head), labels)


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str = "auto",
    head: str | None = None,
    labels: Labels = None,
    adapter: str | Path | None = None,
) -> tuple[Model, Tokenizer]:
    """The model, in inference mode, and tokenizer that MODEL names.

    Args:
        model: a model folder, a run folder, a .gguf file, a hub name `org/name`, a short name from
            `scratchlm models` (fetched on first use), or the folder of an adapter, which brings
            the base that it was made for, and the tokenizer where one lies beside it.
        dtype: the precision of the weights. None keeps what is stored, except that half precision
            becomes fp32 on a CPU that would be slower with it. Matrices in few bits (a GGUF, a
            quantised folder) stay so on a CPU and are computed with as they are; on a GPU, under
            another head, or with a dtype they become numbers. "stored" keeps half precision
            everywhere and makes numbers of the rest, for those who do not want to compute.
        device: "auto" (cuda, mps, cpu), "cpu", "cuda", "cuda:1", "mps".
        head: what is to stand on top: "classification", "regression", "token_classification",
            "multiple_choice", "masked_lm", "embedding" or "none". None gives what was saved. A head
            that is not there starts with random weights, which is said on stderr.
        labels: the labels' names or their number, for the first three of these.
        adapter: the folder of an adapter (PEFT's) to put around the model, or of a run with one.

    Raises `UserError`, naming the file and the remedy, for anything that cannot be loaded.
    """
    path = locate(model)
    if adapter is None and not (path.is_dir() and is_adapter_folder(path)):
        return _load_plain(model, path, dtype, device, head, labels, to_stderr)
    about = about_adapter(path if adapter is None else adapter_at(adapter))
    if adapter is not None and path.is_dir() and is_adapter_folder(path):
        raise UserError(
            f"{model} is an adapter itself, and no other can be put around it: name its base as "
            f"the model ({about_adapter(path).base or 'which it does not say'}), or merge it "
            f"first: scratchlm convert {model} --to hf --out NEW"
        )
    base = base_of(about) if adapter is None else model
    said: list[str] = []
    found, tokenizer = _load_plain(
        base, locate(base), dtype, device, about.head if head is None else head,
        about.labels if labels is None and head is None else labels, said.append,
    )  # fmt: skip
    with_problem(found, about)
    whole = attach(found, about.folder)
    for line in said if not whole else ():  # a head that the adapter did not bring
        to_stderr(line)
    return found.eval(), tokenizer_with(about.folder, tokenizer, found)


def adapter_at(adapter: str | Path) -> Path:
    """The folder of an adapter on this machine, fetched from the hub where it is named so."""
    return find_adapter(_from_hub(str(adapter)) if is_hub_name(adapter) else adapter)


def base_of(about: AboutAdapter) -> str:
    """The base that an adapter names, if it is there."""
    if about.base is None:
        raise UserError(
            f"{about.folder} does not say which model it was made for; load that one and name "
            "this as its adapter."
        )
    try:
        path = locate(about.base)
    except UserError as error:
        raise UserError(
            f"{about.folder} is an adapter of {about.base}, which is not to be had ({error}) Load "
            "its base from where it is, and name this as its adapter."
        ) from error
    if path.is_dir() and is_adapter_folder(path):
        raise UserError(f"{about.folder} is an adapter of another adapter; merge that one first.")
    return about.base


def _load_plain(
    model: str | Path, path: Path, dtype: torch.dtype | str | None, device: str,
    head: str | None, labels: Labels, report: Report,
) -> tuple[Model, Tokenizer]:  # fmt: skip
    """A model without adapters."""
    where = pick_device(device)
    wanted = None if dtype == STORED else as_dtype(dtype)
    packed = dtype is None and where.type == "cpu" and head is None
    if is_hub_name(model) and not any(path.glob("*.safetensors")):
        raise UserError(
            f"The hub's '{model}' has no safetensors; if it has its weights as pickles, turn them "
            f"into a model folder once, which runs nothing: scratchlm convert {model} --to hf "
            "--out NEW"
        )
    if path.is_file():
        quick = where.type == "cuda" and computes_bf16(where)
        fallback = torch.bfloat16 if quick else torch.float32
        decoded, inside = load_gguf(path, wanted or fallback, where, head, packed)
        if inside is None:
            raise UserError(f"{path} holds no tokenizer; convert the model together with its own.")
        return _under_head(decoded, head, labels), inside
    if not is_model_folder(path):
        decoder, own = _load_checkpoint(path, where)
        return _under_head(decoder if wanted is None else decoder.to(wanted), head, labels), own
    if dtype is None and where.type == "cpu" and slow_halves(path, where):
        wanted = torch.float32  # at once: to convert it afterwards would take more memory
    decoder, tokenizer = load_folder(path, wanted, where, head, labels, packed, report)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer.json; copy it from where the model came from.")
    stored = next(decoder.parameters()).dtype
    slow = stored == torch.float16 or (stored == torch.bfloat16 and not computes_bf16(where))
    if dtype is None and where.type == "cpu" and slow:
        decoder.float()
    return decoder, tokenizer
