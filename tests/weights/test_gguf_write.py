"""What our GGUF writer writes, as the `gguf` package reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, quants

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.quant.formats import BF16, F16, F32, Q4_0, Q8_0, Format
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_write import Planned, Typed, write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "test",
    "a.text": "日本語 🍣\n",
    "a.empty": "",
    "a.flag": True,
    "a.count": 7,
    "a.large": 1 << 60,
    "a.number": 0.1,
    "a.texts": ["x", "", "ü"],
    "a.numbers": [1, -2, 1 << 30],
    "a.scores": [0.5, -1e30],
    "a.flags": [True, False],
    "a.bytes": bytes(range(256)),
    "a.none": [],
    "a.small": Typed(3, -7),
    "a.double": Typed(12, 0.1),
    "a.shorts": Typed(2, [1, 65535]),
}


def planned(name: str, values: torch.Tensor, form: Format) -> Planned:
    return Planned(name, tuple(values.shape), form, lambda: values)


def test_metadata_is_what_was_given(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", METADATA, [])
    reader = GGUFReader(tmp_path / "m.gguf")
    wanted = {k: v.value if isinstance(v, Typed) else v for k, v in METADATA.items()}
    wanted |= {"a.bytes": list(range(256)), "a.number": float(np.float32(0.1))}
    wanted["a.scores"] = [0.5, float(np.float32(-1e30))]
    del wanted["a.none"]  # the package has no type for a list of nothing
    for key, value in wanted.items():
        assert reader.fields[key].contents() == value, key
    kinds = {key: field.types[-1] for key, field in reader.fields.items()}
    assert kinds["a.count"] == GGUFValueType.UINT32
    assert kinds["a.large"] == GGUFValueType.UINT64
    assert kinds["a.numbers"] == GGUFValueType.INT32
    assert kinds["a.bytes"] == GGUFValueType.UINT8
    assert kinds["a.small"] == GGUFValueType.INT16
    ours = GGUF(tmp_path / "m.gguf")
    assert ours.version == 3
    assert ours.metadata == {**wanted, "a.none": []}


@pytest.mark.parametrize("form", [F32, F16, BF16, Q8_0, Q4_0], ids=lambda form: form.name)
def test_tensors_lie_where_the_header_says(form: Format, tmp_path: Path) -> None:
    """Sizes that are no multiple of the alignment, more than two axes, more than one part."""
    shapes = {"one": (32,), "odd": (3, 32), "cube": (5, 2, 64), "large": (700, 512)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    write_gguf(
        tmp_path / "t.gguf",
        {"general.architecture": "test"},
        [planned(name, values, form) for name, values in tensors.items()],
    )
    reader, ours = GGUFReader(tmp_path / "t.gguf"), GGUF(tmp_path / "t.gguf")
    assert [tensor.name for tensor in reader.tensors] == list(shapes)
    for tensor in reader.tensors:
        values = tensors[tensor.name]
        assert tensor.data_offset % 32 == 0
        assert tuple(tensor.shape)[::-1] == shapes[tensor.name]
        assert tensor.tensor_type == GGMLQuantizationType(form.number)
        raw = quants.quantize(values.numpy(), tensor.tensor_type)
        assert tensor.data.tobytes() == raw.tobytes()
        decoded = quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        np.testing.assert_array_equal(ours.read(tensor.name).numpy(), decoded)


def test_tensors_are_made_one_at_a_time_and_in_order(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        made.append(name)
        return torch.ones(2, 32)

    plan = [Planned(name, (2, 32), F32, lambda name=name: make(name)) for name in "abc"]
    assert made == []
    write_gguf(tmp_path / "t.gguf", {}, plan)
    assert made == ["a", "b", "c"]


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    write_gguf(path, {"general.name": "old"}, [])
    bad = torch.full((1, 32), float("nan"))
    with pytest.raises(UserError, match=r"'bad' cannot be written as Q8_0: .* not finite"):
        write_gguf(path, {}, [planned("good", torch.ones(4, 32), F32), planned("bad", bad, Q8_0)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.gguf"]
    assert GGUF(path).metadata == {"general.name": "old"}
