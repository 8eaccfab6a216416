"""Published models that the tests marked `weights` read where somebody has put them.

They lie in `$SCRATCHLM_TEST_WEIGHTS` (without it, `scratchlm-test` in the system's usual cache
folder), a folder per model, with the names that their authors gave them. Nothing here fetches them;
a test whose files are not there is skipped, and one whose files are others fails.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from llm_from_scratch.core.files import sha256_of

FOLDER = Path(os.environ.get("SCRATCHLM_TEST_WEIGHTS", Path.home() / ".cache" / "scratchlm-test"))

# name -> file below its folder -> SHA-256
# fmt: off
FILES = {
    "qwen2.5-coder-0.5b": {
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf":
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    },
    "gemma-3-270m": {
        "gemma-3-270m-q4_k_m.gguf":
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    },
    "all-mpnet-base-v2": {
        "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
        "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
        "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
        "special_tokens_map.json":
            "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
        "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "1_Pooling/config.json": "a37f83ada23e7887be6b88f4998927dbeac0038af301553c7cd5461413bf1a56",
    },
    "opus-mt-en-fr": {
        "config.json": "df92c371911b45282caac6101fe7e7f5d5e9af7f9a99356067ffe306278ce72b",
        "generation_config.json":
            "4956fb9a7caaad7579cf8bb789c1e578b8a1cf48a0a8b779fda2f95dd10bbaa5",
        "pytorch_model.bin": "cc1de10b49342ad2f33e06bc4474ddd6eaca278474903c4a8636ce15680d64de",
        "source.spm": "173e9f493a668fe396d599e28d414a201193094e6ffd7a4678e5aab0f6d3d838",
        "target.spm": "78d0e717c77053f1c4b856d8661d9cb87c64f083a35418c087b9146300e4f585",
        "tokenizer_config.json": "3492a8555368d21fc116cac84bdf551aee16783413be3afbfe4823de045960cf",
        "vocab.json": "945c604346ce15ce4aff9001001e7f925e336d942c4087017f191871162cbdc4",
    },
    "stories15M": {
        "stories15M.bin": "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a",
        "tokenizer.bin": "74f899535f8f99cdeac697474b697f3fa40467b8376dab7b6c4d8c753f28ae9f",
    },
}
# fmt: on


@cache
def changed(path: Path, sha256: str) -> bool:
    return sha256_of(path) != sha256


def real(name: str) -> Path:
    """The folder of a model; the test is skipped where one of its files is missing."""
    folder = FOLDER / name
    for file, sha256 in FILES[name].items():
        if not (folder / file).is_file():
            pytest.skip(f"there is no {folder / file}")
        assert not changed(folder / file, sha256), f"{folder / file} is another file"
    return folder
