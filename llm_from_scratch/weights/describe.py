"""What a MODEL is, read from its description alone: no weight is loaded.

The description is a `config.json`, the metadata of a GGUF file, or the `config.yaml` of a run. Of
weights that lie beside it, at most the names are read.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.heads import HeadConfig
from llm_from_scratch.model.inventory import AnyConfig
from llm_from_scratch.model.presets import PRESETS, ModelSettings, resolve
from llm_from_scratch.quant.formats import FORMATS
from llm_from_scratch.quant.packed import why_not_packed
from llm_from_scratch.weights.adapter_config import CONFIG, TENSORS, read_adapter_config
from llm_from_scratch.weights.adapter_folder import about_adapter
from llm_from_scratch.weights.adapters import PART
from llm_from_scratch.weights.catalogue import CATALOGUE, Report, local_path, to_stderr
from llm_from_scratch.weights.families import Family, read_config
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_load import embedding_head
from llm_from_scratch.weights.gguf_load import read_config as read_gguf_config
from llm_from_scratch.weights.heads import Labels, want, with_pooler, without_head
from llm_from_scratch.weights.quantized import PACKED, take_scheme
from llm_from_scratch.weights.sources import DTYPES, base_of, locate_description
from llm_from_scratch.weights.stored import open_tensors

ROW = 1024  # whole blocks of any format


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter without its weights.

    `kind` is lora, rslora, dora or rsdora; `base` what it names as its base; `parameters` are those
    of the adapters of `layers` layers, `whole` those of layers that were trained as they are.
    """

    kind: str
    rank: int
    alpha: float
    base: str
    layers: int
    parameters: int
    whole: int
    bytes: int


@dataclass(frozen=True)
class Description:
    """A model without its weights.

    `source` is what was read, `form` the precision in which the weights are stored ("bf16", a
    format of GGUF), `stored_bytes` what they take there; None where there are none. Where MODEL is
    an adapter, all of this is said of its base, under the head that it brings.
    """

    source: str
    config: AnyConfig
    head: HeadConfig | None = None
    form: str | None = None
    stored_bytes: int | None = None
    adapter: AdapterFacts | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The precision of the stored weights; None for formats that are decoded."""
        return None if self.form is None else DTYPES.get(self.form)

    @property
    def kept(self) -> bool:
        """Whether a CPU computes with most of the weights as they are stored, in few bits."""
        form = next((form for form in FORMATS.values() if form.name == self.form), None)
        if form is None:
            return self.form is not None and self.dtype is None
        return form.values > 1 and why_not_packed(form, ROW) is None


def describe(model: str | Path, report: Report = to_stderr) -> Description | Path:
    """The model that MODEL names; of a run without a model, the path of its config.yaml.

    A short name that is not pulled yet is described by the preset of that name (one without a
    preset is fetched), and of a hub name only config.json is fetched (an adapter's two files and
    the config.json of its base). Raises `UserError` for what
    cannot be found or read.
    """
    name = str(model)
    known = name in CATALOGUE and name in PRESETS and not Path(name).expanduser().exists()
    if known and local_path(name) is None:
        return describe_preset(name)
    path = locate_description(model, report)
    if path.suffix in (".yaml", ".yml"):
        return path
    if path.name == CONFIG:
        return describe_adapter(path.parent, report)
    return describe_folder(path.parent) if path.name == "config.json" else describe_gguf(path)


def describe_preset(name: str) -> Description:
    """A size of `scratchlm models`, with the published vocabulary and context."""
    if name not in PRESETS:
        raise UserError(
            f"There is no preset '{name}'; there are {', '.join(PRESETS)}.{nearest(name, PRESETS)}"
        )
    sizes = {key: value for key, value in PRESETS[name][1].items() if isinstance(value, int)}
    config = resolve(ModelSettings(preset=name), sizes["vocab_size"], sizes["max_seq_len"])
    return Description(f"preset {name}", config)


def describe_gguf(path: Path) -> Description:
    """A GGUF file, by its metadata and the list of its tensors."""
    file = GGUF(path)
    table, config = read_gguf_config(file)
    head, sizes = embedding_head(file, table), file.forms()
    return Description(str(path), config, head, max(sizes, key=sizes.__getitem__), sizes.total())


def describe_adapter(folder: Path, report: Report = to_stderr) -> Description:
    """The folder of an adapter, and the base that it names."""
    about, settings, path = about_adapter(folder), read_adapter_config(folder), folder / TENSORS
    base = base_of(about)
    place = locate_description(base, report)
    labels = about.labels
    found = (
        describe_folder(place.parent, about.head, labels)
        if place.name == "config.json" else describe(place, report)
    )  # fmt: skip
    if isinstance(found, Path):
        raise UserError(f"{folder} is an adapter of {base}, which is a run without a model yet.")
    modules, counts = set[str](), {"parts": 0, "whole": 0}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                match = PART.fullmatch(name)
                modules |= set() if match is None else {match[1]}
                size = math.prod(file.get_slice(name).get_shape())
                counts["whole" if match is None else "parts"] += size
        stored = path.stat().st_size
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it anew.") from error
    facts = AdapterFacts(
        settings.kind, settings.rank, settings.alpha, base, len(modules), counts["parts"],
        counts["whole"], stored,
    )  # fmt: skip
    return replace(found, adapter=facts)


def describe_folder(
    folder: Path, head: str | None = None, labels: Labels = None
) -> Description:  # fmt: skip
    """A model folder, complete or with its config.json alone; `head` and `labels` as in `load`."""
    where = folder / "config.json"
    values = read_json_object(where)
    scheme = take_scheme(values, str(where))
    family, config = read_config(values, str(where))
    try:
        wanted = want(family, values, head, labels, folder)
    except UserError:  # a class with a head that we do not have: the model under it
        wanted = want(family, values, "none", None, folder)
    stored_names = _stored_names(family, folder)
    if stored_names:
        wanted = without_head(family, wanted, dict.fromkeys(stored_names, ""))
    names = stored_names or {f"{rule.theirs}.weight" for rule in family.tensors}
    config = with_pooler(family, _tied(family, config, names), wanted, names)
    files = list(folder.glob("*.safetensors"))
    stored = values.get("dtype", values.get("torch_dtype"))
    form = next((short for short in ("fp32", "bf16", "fp16") if _is(stored, short)), None)
    form = scheme.kind if scheme is not None else form
    size = sum(file.stat().st_size for file in files) if files else None
    return Description(str(where), config, wanted.head, form, size)


def _is(stored: object, short: str) -> bool:
    return isinstance(stored, str) and DTYPES.get(stored) == DTYPES[short]


def _stored_names(family: Family, folder: Path) -> set[str]:
    """The names of the stored tensors, full and as given; none where they cannot be read."""
    if any(folder.glob("*.safetensors")):
        # A folder whose weights are still on their way is described all the same.
        with contextlib.suppress(UserError), open_tensors(folder) as tensors:
            names = {name.replace(PACKED, ".weight") for name in tensors.files}
            return names | {family.prefix + name for name in names}
    return set()


def _tied(family: Family, config: AnyConfig, names: set[str]) -> AnyConfig:
    """Where the weights decide whether the head is a matrix of its own (T5): is one stored?"""
    if not family.tied_as_stored or not isinstance(config, EncoderDecoderConfig):
        return config
    head = next(
        f"{rule.theirs}.weight" for rule in family.tensors if rule.ours == ("decoder.head",)
    )
    tied = head not in names or config.decoder.tie_embeddings
    return replace(config, decoder=replace(config.decoder, tie_embeddings=tied))
