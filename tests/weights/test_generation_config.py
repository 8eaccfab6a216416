"""generation_config.json says where targets begin and end, over the older fields of config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.weights.folder import load_folder
from tests.model.references_seq2seq import make_seq2seq


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config.json has its texts begin with 7 and end with 8."""
    folder = tmp_path_factory.mktemp("bart")
    make_seq2seq("bart").save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text("utf-8"))
    values |= {"forced_bos_token_id": 7, "forced_eos_token_id": 8}
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("said", "first", "end"),
    [
        (None, 7, 8),
        ({}, 7, 8),
        ({"forced_bos_token_id": 3}, 3, 8),
        ({"forced_eos_token_id": 4}, 7, 4),
        ({"forced_bos_token_id": None, "forced_eos_token_id": None}, None, None),
    ],
)
def test_what_it_says_counts(
    said: dict[str, Any] | None, first: int | None, end: int | None, bart: Path
) -> None:
    place = bart / "generation_config.json"
    place.unlink(missing_ok=True)
    if said is not None:
        place.write_text(json.dumps(said), "utf-8")
    config = load_folder(bart)[0].config
    assert isinstance(config, EncoderDecoderConfig)
    assert (config.first_id, config.end_id) == (first, end)


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
def test_a_token_beyond_the_vocabulary_is_named(name: str, bart: Path) -> None:
    (bart / "generation_config.json").write_text(json.dumps({name: 5000}), "utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json: \w+_id is 5000, but the"):
        load_folder(bart)
