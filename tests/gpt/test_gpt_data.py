"""Characters to numbers, and windows of them that do not leak."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.gpt import SimpleTokenizer, TextDataset, create_dataloaders


class Numbers:
    """Text "0 1 2" is the tokens 0, 1, 2: every token of a test has a value of its own."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def numbers(count: int) -> str:
    return " ".join(map(str, range(count)))


def test_tokenizer() -> None:
    tokenizer = SimpleTokenizer("hello 世界")
    assert tokenizer.vocab_size == len(tokenizer) == 7
    assert list(tokenizer.char_to_idx) == sorted(set("hello 世界"))
    assert tokenizer.idx_to_char == {i: c for c, i in tokenizer.char_to_idx.items()}
    ids = tokenizer.encode("世 hello")
    assert tokenizer.decode(ids) == "世 hello"
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(np.array(ids)) == "世 hello"
    assert tokenizer.decode([*ids, 99]) == "世 hello"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_unknown_character_is_named_with_its_place() -> None:
    tokenizer = SimpleTokenizer("abc")
    with pytest.raises(UserError, match=r"character 'Z' \(number 4 of the text\)"):
        tokenizer.encode("abcZ")
    with pytest.raises(UserError, match="text is empty"):
        SimpleTokenizer("")


def test_tokenizer_goes_on_in_the_project(tmp_path: Path) -> None:
    text = 'Hello,\n  world!\t「こんにちは」 \\ " 🙂'
    tokenizer = SimpleTokenizer(text)
    same = tokenizer.to_tokenizer()
    assert same.encode(text) == tokenizer.encode(text)
    assert same.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path)
    assert SimpleTokenizer.load(tmp_path).char_to_idx == tokenizer.char_to_idx


def test_load_refuses_another_kind_of_vocabulary(tmp_path: Path) -> None:
    from llm_from_scratch.text.training import train_tokenizer

    train_tokenizer(["abcabc"], vocab_size=260).save(tmp_path)
    with pytest.raises(UserError, match="does not hold a plain character vocabulary"):
        SimpleTokenizer.load(tmp_path)


def test_windows() -> None:
    dataset = TextDataset(numbers(10), Numbers(), block_size=4)
    assert dataset.tokens == list(range(10)) and dataset.block_size == 4
    assert len(dataset) == 6
    for i, (x, y) in enumerate(dataset[i] for i in range(6)):
        assert x.dtype == y.dtype == torch.int64
        assert x.tolist() == list(range(i, i + 4)) and y.tolist() == list(range(i + 1, i + 5))
    with pytest.raises(IndexError):
        dataset[6]
    with pytest.raises(UserError, match="The text has 4 tokens, but a block_size of 4 needs 5"):
        TextDataset(numbers(4), Numbers(), block_size=4)


def test_loader_signature() -> None:
    parameters = inspect.signature(create_dataloaders).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == {
        "block_size": 128, "batch_size": 64, "train_split": 0.9, "num_workers": 0, "seed": 0,
    }  # fmt: skip
    assert list(parameters)[:2] == ["text", "tokenizer"]


def tokens_of(loader: torch.utils.data.DataLoader) -> set[int]:
    return {token for batch in loader for part in batch for token in part.flatten().tolist()}


@pytest.mark.parametrize("train_split", [0.5, 0.9, 0.99])
def test_validation_shares_no_token_with_training(train_split: float) -> None:
    train, val = create_dataloaders(numbers(100), Numbers(), 8, 4, train_split)
    seen, held_out = tokens_of(train), tokens_of(val)
    assert seen and held_out and not seen & held_out
    assert max(seen) < min(held_out)
    targets = [token for _, y in val for token in y.flatten().tolist()]
    assert len(targets) == len(set(targets))  # every validation target counts once
    x, y = next(iter(train))
    assert x.shape == y.shape == (4, 8)


def test_training_order_follows_the_seed_alone() -> None:
    def order(seed: int) -> list[int]:
        train, _ = create_dataloaders(numbers(60), Numbers(), 4, 3, seed=seed)
        return [first for x, _ in train for first in x[:, 0].tolist()]

    torch.manual_seed(1)
    one = order(7)
    torch.manual_seed(2)
    assert order(7) == one != order(8)
    assert sorted(one) == list(range(50))


def test_loaders_asked_wrongly() -> None:
    train, val = create_dataloaders(numbers(20), Numbers(), 4, 3, train_split=1.0)
    assert len(train) == 6 and len(val) == 0
    with pytest.raises(UserError, match="too few to cut windows of block_size 8"):
        create_dataloaders(numbers(17), Numbers(), 8)
    with pytest.raises(UserError, match=r"train_split is 1\.5"):
        create_dataloaders(numbers(20), Numbers(), 4, train_split=1.5)
    with pytest.raises(UserError, match="batch_size is 0"):
        create_dataloaders(numbers(20), Numbers(), 4, batch_size=0)
