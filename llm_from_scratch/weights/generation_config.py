"""generation_config.json: where a model's texts begin and end.

Of what else the file may say, such as beams, a temperature or lengths, nothing is applied: see
docs/en/encoder-decoders.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.config_json import Fields
from llm_from_scratch.weights.families import AnyConfig


def as_generated(config: AnyConfig, folder: Path) -> AnyConfig:
    """With the tokens that targets must begin and end with as generation_config.json has them.

    What it says counts before the older fields of config.json.
    """
    where = folder / "generation_config.json"
    if not isinstance(config, EncoderDecoderConfig) or not where.is_file():
        return config
    fields = Fields(read_json_object(where), {}, str(where))
    first, end = config.first_id, config.end_id
    if "forced_bos_token_id" in fields.values:
        first = fields.maybe_token_id("forced_bos_token_id")
    if "forced_eos_token_id" in fields.values:
        end = fields.maybe_token_id("forced_eos_token_id")
    try:
        return replace(config, first_id=first, end_id=end)
    except UserError as error:  # beyond the vocabulary
        raise UserError(f"{where}: {error}") from error


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The ids of the special tokens by their names in JSON; None for what is not there."""
    names = ("bos_id", "eos_id", "pad_id")
    return {name[:3] + "_token_id": getattr(tokenizer, name, None) for name in names}


def generation_config_json(config: AnyConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The content of generation_config.json: where generation starts and ends."""
    values: dict[str, Any] = {k: v for k, v in token_ids(tokenizer).items() if v is not None}
    if isinstance(config, EncoderDecoderConfig):
        values["decoder_start_token_id"] = config.start_id
        if config.first_id is not None:
            values["forced_bos_token_id"] = config.first_id
        if config.end_id is not None:
            values["forced_eos_token_id"] = config.end_id
        if not config.writes_start:
            values["bad_words_ids"] = [[config.start_id]]
    stops = sorted(tokenizer.stop_ids) if tokenizer is not None else []
    if stops:
        values["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return values
