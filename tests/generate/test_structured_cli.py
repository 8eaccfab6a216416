"""The flags of `scratchlm generate` for penalties, biases and forms reach the settings."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from llm_from_scratch.cli.main import run
from llm_from_scratch.core.errors import UserError

SCHEMA = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}


def test_every_flag_reaches_the_settings(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--presence-penalty 0.5 --frequency_penalty -0.5 --no_repeat_ngram 3 --max_new_tokens 4 "
        "--logit_bias 5=-100 7=2.5 --logprobs 2 --prompt_logprobs 1 --json"
    )
    assert run(["generate", folder, "Once", *flags.split()]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert found["presence_penalty"] == 0.5 and found["frequency_penalty"] == -0.5
    assert found["no_repeat_ngram"] == 3
    assert found["logit_bias"] == {"5": -100.0, "7": 2.5}
    assert (found["logprobs"], found["prompt_logprobs"]) == (2, 1)


def test_forms(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schema.json"
    path.write_text("\ufeff" + json.dumps(SCHEMA), encoding="utf-8")
    for given in (str(path), " " + json.dumps(SCHEMA)):
        assert run(["generate", folder, "Once", "--json_schema", given]) == 0
        jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)
    assert run(["generate", folder, "Once", "--regex", "[ab]{3}"]) == 0
    assert set(capsys.readouterr().out.strip()) <= {"a", "b"}
    assert run(["generate", folder, "Once", "--choice", "yes", "no"]) == 0
    assert capsys.readouterr().out.strip() in ("yes", "no")


def test_a_file_that_is_no_schema(folder: str, tmp_path: Path) -> None:
    for name, content, message in (
        ("text.json", b"hello", "is not valid JSON"),
        ("latin.json", b"\xe9", "is not UTF-8 text"),
        ("large.json", b" " * (5 << 20), "is larger than 4 MiB"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            run(["generate", folder, "Once", "--json_schema", str(tmp_path / name)])
    with pytest.raises(UserError, match="neither a JSON object nor a file"):
        run(["generate", folder, "Once", "--json_schema", str(tmp_path)])
