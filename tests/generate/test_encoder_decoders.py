"""Encoder-decoders write through the same code: sources in, targets out."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

import llm_from_scratch as llm
from llm_from_scratch.cli.main import run
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.chat import LocalChat
from llm_from_scratch.generate.engine import generate_tokens
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.generate.requests import NewToken
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.text.inputs import template
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.weights.folder import load_folder, save_folder
from tests.generate.conftest import TEXT
from tests.generate.engines import Listening, engine_for
from tests.model.references_seq2seq import SEQ2SEQ, make_seq2seq

SOURCES = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [11, 12, 13, 14]]
FIRST = "forced_bos_token_id"
GREEDY = SamplingSettings(max_new_tokens=12, temperature=0.0)


def made(family: str, folder: Path, **changes: Any) -> EncoderDecoder:
    make_seq2seq(family, **changes).save_pretrained(folder)
    ours, _ = load_folder(folder)
    assert isinstance(ours, EncoderDecoder)
    return ours


@pytest.fixture(scope="module", params=list(SEQ2SEQ))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made(request.param, tmp_path_factory.mktemp(request.param))


def by_row(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings = GREEDY,
    stop: Any = (),
) -> dict[int, list[NewToken]]:
    rows: dict[int, list[NewToken]] = {}
    for step in generate_tokens(model, sources, settings, stop):
        for new in step:
            rows.setdefault(new.request, []).append(new)
    return rows


def ids(new: list[NewToken]) -> list[int]:
    return [one.token for one in new]


@pytest.mark.parametrize("ends", [False, True])
def test_cached_logits_equal_uncached_at_every_position(model: EncoderDecoder, ends: bool) -> None:
    """Also while rows leave the batch."""
    free = by_row(model, SOURCES)
    stop = [free[row][3 + row].token for row in range(3)] if ends else []
    engine = engine_for(model, SOURCES, GREEDY, stop)
    engine.runner = listening = Listening(engine)
    targets = [[model.config.start_id] for _ in SOURCES]
    while engine.busy:
        new = engine.step()
        rows, logits = listening.heard[-1]
        for row, found in zip(rows, logits, strict=True):
            with torch.inference_mode():
                source, target = torch.tensor([SOURCES[row]]), torch.tensor([targets[row]])
                expected = model(source, target)[0, -1]
            scale = expected.abs().max()
            torch.testing.assert_close(found / scale, expected / scale, atol=2e-5, rtol=0)
        for one in new:
            targets[one.request].append(one.token)
    assert min(map(len, targets)) < 12 or not ends


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_of_unequal_sources_equals_each_alone(
    model: EncoderDecoder, temperature: float
) -> None:
    settings = SamplingSettings(
        max_new_tokens=12, temperature=temperature, top_p=0.95, repetition_penalty=1.2, seed=3
    )
    together = by_row(model, SOURCES, settings)
    for row, source in enumerate(SOURCES):
        alone = by_row(model, [source], replace(settings, seed=3 + row))
        assert ids(alone[0]) == ids(together[row])


def test_rows_can_be_dropped_at_any_time(model: EncoderDecoder) -> None:
    """Also before the encoder has read their sources."""
    free = by_row(model, SOURCES)
    engine = engine_for(model, SOURCES, GREEDY)
    engine.cancel(0)
    first = engine.step()
    engine.cancel(3)
    second = engine.step()
    assert [(one.request, one.token) for one in first] == [(r, free[r][0].token) for r in (1, 2, 3)]
    assert [(one.request, one.token) for one in second] == [(r, free[r][1].token) for r in (1, 2)]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers_generate(
    model: EncoderDecoder, tmp_path: Path, penalty: float
) -> None:
    """With what generation_config.json says: no padding inside, an end at the greatest length."""
    save_folder(model, None, tmp_path / "model")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    settings = replace(GREEDY, max_new_tokens=20, repetition_penalty=penalty)
    for source in SOURCES:
        expected = theirs.generate(
            torch.tensor([source]), attention_mask=torch.ones(1, len(source), dtype=torch.long),
            do_sample=False, max_new_tokens=20, repetition_penalty=penalty, pad_token_id=0,
            eos_token_id=model.config.end_id,
        )  # fmt: skip
        assert ids(by_row(model, [source], settings)[0]) == expected[0, 1:].tolist()


@pytest.mark.parametrize("whole", [True, False], ids=["weights", "activations"])
def test_half_precision_writes_too(model: EncoderDecoder, whole: bool) -> None:
    half = copy.deepcopy(model)
    if whole:
        half = half.to(torch.bfloat16)
    else:
        half.compute_dtype = torch.bfloat16
    heard = []
    for one in (half, model):
        engine = engine_for(one, SOURCES, GREEDY)
        engine.runner = listening = Listening(engine)
        engine.step()
        heard.append((engine.pool.keys.dtype, listening.heard[0][1]))
    (dtype, got), (_, wanted) = heard
    assert dtype == torch.bfloat16
    assert (got.float() - wanted).abs().mean() < 0.05 * wanted.abs().max()
    assert all(len(row) == 12 for row in by_row(half, SOURCES).values())


def test_what_marian_never_writes(tmp_path: Path) -> None:
    """Its start token is the padding; the greatest length is made to end a target."""
    model = made("marian", tmp_path)
    start, end = model.config.start_id, 5
    assert model.config.end_id == end
    with torch.no_grad():
        model.logits_bias[start] = 1e4
    rows = by_row(model, SOURCES)
    assert all(start not in ids(row) for row in rows.values())
    save_folder(model, None, tmp_path / "ours")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    for row, source in enumerate(SOURCES):  # which generation_config.json tells
        expected = theirs.generate(torch.tensor([source]), do_sample=False, max_new_tokens=12)
        assert ids(rows[row]) == expected[0, 1:].tolist()
    assert {row[-1] for row in rows.values()} == {NewToken(r, 0, end, "length") for r in range(4)}
    with torch.no_grad():
        model.logits_bias[end] = 2e4
    assert by_row(model, [[1]])[0] == [NewToken(0, 0, end, "stop")]
    # T5 may write whatever it likes.
    model.config = replace(model.config, writes_start=True, end_id=None)
    with torch.no_grad():
        model.logits_bias[end] = 0
    assert ids(by_row(model, [[1]])[0]) == [start] * 12


@pytest.mark.parametrize("family", list(SEQ2SEQ))
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_beginning_that_is_forced(family: str, file: str, tmp_path: Path) -> None:
    """As the library has it; generation_config.json counts before config.json."""
    made(family, tmp_path / "m")
    generation = tmp_path / "m" / "generation_config.json"
    said = json.loads(generation.read_text("utf-8"))
    said.pop("forced_bos_token_id", None)
    generation.write_text(json.dumps(said), "utf-8")
    path = tmp_path / "m" / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {FIRST: 9}), "utf-8")
    model = load_folder(tmp_path / "m")[0]
    assert isinstance(model, EncoderDecoder) and model.config.first_id == 9
    save_folder(model, None, tmp_path / "ours")
    assert load_folder(tmp_path / "ours")[0].config == model.config
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    rows = by_row(model, SOURCES)
    for row, source in enumerate(SOURCES):
        expected = theirs.generate(
            torch.tensor([source]), attention_mask=torch.ones(1, len(source), dtype=torch.long),
            do_sample=False, max_new_tokens=12, pad_token_id=0,
        )  # fmt: skip
        assert ids(rows[row]) == expected[0, 1:].tolist()
        assert rows[row][0].token == 9
    generation.write_text(json.dumps(said | {FIRST: 10_000}), "utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json: first_id is 10000"):
        load_folder(tmp_path / "m")
    generation.write_text(json.dumps(said | {FIRST: None}), "utf-8")
    assert getattr(load_folder(tmp_path / "m")[0].config, "first_id", 0) is None


def test_sources_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    model = made("marian", tmp_path)  # 71 entries to read, 67 to write; 48 places
    by_row(model, [[70] * 48])
    for sources, named in (
        ([[71]], "token id 71"),
        ([[3] * 49], "49 tokens"),
        ([[]], "no tokens"),
        ([], "no prompt"),
    ):
        with pytest.raises(UserError, match=named):
            by_row(model, sources)
    long = replace(GREEDY, max_new_tokens=100)
    assert len(by_row(model, [[3]], long)[0]) == 47  # and the start token


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderDecoder, Tokenizer, Path]:
    """A model with a tokenizer that puts an end behind every source."""
    tokenizer = train_tokenizer([TEXT], vocab_size=300, special=["<pad>", "</s>"])
    tokenizer.config |= {"eos_token": "</s>", "pad_token": "<pad>"}
    around = template("A eos", "A eos B eos", {"eos": "</s>"}, tokenizer.special_tokens, False)
    tokenizer = Tokenizer.from_spec({**tokenizer.spec, "post_processor": around}, tokenizer.config)
    folder = tmp_path_factory.mktemp("translator")
    sizes = {"vocab_size": tokenizer.vocab_size, "decoder_start_token_id": 0, "eos_token_id": 1}
    model = made("t5", folder / "t5", **sizes)
    save_folder(model, tokenizer, folder / "model")
    return model, tokenizer, folder / "model"


def test_text_goes_in_and_text_comes_out(
    translator: tuple[EncoderDecoder, Tokenizer, Path],
) -> None:
    model, tokenizer, _ = translator
    prompts = ["Once upon a time", "むかしむかし", ""]
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    results = complete(model, tokenizer, prompts, **settings)
    for prompt, result in zip(prompts, results, strict=True):
        source = [*tokenizer.encode(prompt), tokenizer.eos_id]
        assert result.prompt_tokens == len(source)
        new = ids(by_row(model, [source], stop=tokenizer.stop_ids)[0])  # type: ignore[list-item]
        assert result.tokens == [token for token in new if token != tokenizer.eos_id]
        assert result.text == tokenizer.decode(result.tokens, skip_special=True)
        assert "".join(llm.generate(model, tokenizer, prompt, **settings)) == result.text


def test_an_end_that_is_forced_is_not_shown(
    translator: tuple[EncoderDecoder, Tokenizer, Path],
) -> None:
    model, tokenizer, _ = translator
    changed = EncoderDecoder(replace(model.config, end_id=tokenizer.eos_id)).eval()
    changed.load_state_dict(model.state_dict())
    free = complete(model, tokenizer, ["Once"], max_new_tokens=6, temperature=0.0)[0]
    ended = complete(changed, tokenizer, ["Once"], max_new_tokens=6, temperature=0.0)[0]
    assert free.finish_reason == ended.finish_reason == "length"
    assert ended.tokens == free.tokens[:5] and free.text.startswith(ended.text)


def test_the_command(
    translator: tuple[EncoderDecoder, Tokenizer, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --temperature the likeliest target is written."""
    model, tokenizer, folder = translator
    wanted = "".join(llm.generate(model, tokenizer, "a king", max_new_tokens=9, temperature=0))
    assert run(["generate", str(folder), "a king", "--max_new_tokens", "9"]) == 0
    assert capsys.readouterr().out == wanted + "\n"
    assert run(["generate", str(folder), "a king", "--max_new_tokens", "9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == wanted and found["settings"]["temperature"] == 0.0
    assert run(["generate", str(folder), "a king", "--temperature", "1.0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["temperature"] == 1.0


def test_no_conversation_with_a_translator(
    translator: tuple[EncoderDecoder, Tokenizer, Path],
) -> None:
    model, tokenizer, _ = translator
    with pytest.raises(UserError, match="holds no conversation"):
        LocalChat(model, tokenizer)
