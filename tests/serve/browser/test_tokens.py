"""The tokens of an answer: their colours, their alternatives, and another way on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.serve.browser.speaker import ANSWER, BRANCH, FORK, OTHER, speaker_tokenizer
from tests.serve.browser.talk import Requests, finished, said


@pytest.fixture
def answer(page: Any) -> Any:
    """An answer that is shown in tokens."""
    said(page, "Hello", ANSWER)
    page.locator("label", has=page.locator("#show-tokens")).click()
    return page.locator(".message.assistant")


def piece_of(answer: Any, place: int) -> Any:
    return answer.locator(f".piece[data-place='{place}']")


def place_of(text: str) -> int:
    tokenizer = speaker_tokenizer()
    return tokenizer.encode(ANSWER).index(tokenizer.encode(text)[0])


def test_tokens_are_shown_as_they_are(answer: Any) -> None:
    """One element for each token with its id; bytes of a character are marked as such."""
    ids = speaker_tokenizer().encode(ANSWER)
    pieces = answer.locator(".piece")
    expect(pieces).to_have_count(len(ids))
    titles = [pieces.nth(place).get_attribute("title") for place in range(len(ids))]
    assert [int(title.split()[0]) for title in titles] == ids
    expect(pieces.first).to_have_text("Stars")
    expect(answer.locator(".piece.part")).to_have_count(4)
    levels = [pieces.nth(place).get_attribute("class") for place in range(len(ids))]
    assert all("level-4" in level for level in levels)  # it is sure of every one


def test_tokens_stream_too(page: Any, site: Any, answer: Any) -> None:
    site.gate.hold(after=3)
    page.locator("#message").fill("again")
    page.locator("#message").press("Enter")
    expect(page.locator(".message.assistant").last.locator(".piece")).to_have_count(3)
    site.gate.open()
    finished(page, 2)
    count = len(speaker_tokenizer().encode(ANSWER))
    expect(page.locator(".message.assistant").last.locator(".piece")).to_have_count(count)


def test_continue_from_another_token(page: Any, answer: Any) -> None:
    """The answer stands as it was up to there; the model reads just these ids and goes on."""
    sent = Requests(page, "/v1/completions")
    tokenizer, place = speaker_tokenizer(), place_of(FORK)
    piece_of(answer, place).click()
    panel = page.locator("#token-panel")
    expect(panel).to_be_visible()
    rows = panel.locator(".alternatives li")
    expect(rows).to_have_count(8)
    expect(rows.nth(0)).to_contain_text("sleep")
    expect(rows.nth(0)).to_contain_text("100.0 %")
    expect(rows.nth(1)).to_contain_text("dream")
    expect(rows.nth(1)).to_contain_text(str(tokenizer.encode(BRANCH)[0]))
    rows.nth(1).locator(".pick").click()
    finished(page)
    expect(panel).to_have_count(0)
    (body,) = sent.bodies
    assert body["prompt"][-place - 1 :] == [
        *tokenizer.encode(ANSWER)[:place],
        *tokenizer.encode(BRANCH),
    ]
    assert tokenizer.decode(body["prompt"][: -place - 1]).endswith("assistant\n")
    expect(answer.locator(".piece.picked")).to_have_text(re.compile("dream"))
    expect(answer.locator(".versions")).to_contain_text("2/2")
    page.locator("label", has=page.locator("#show-tokens")).click()
    expect(answer.locator(".body")).to_have_text(OTHER)
    answer.locator(".versions button").first.click()
    expect(answer.locator(".body")).to_have_text(ANSWER)


def test_the_alternative_that_ends_the_text(page: Any, answer: Any) -> None:
    """A stop token is an alternative like any other: the answer then ends there."""
    last = len(speaker_tokenizer().encode(ANSWER)) - 1
    piece_of(answer, last).click()
    expect(page.locator("#token-panel .alternatives li")).to_have_count(8)
    page.keyboard.press("Escape")
    expect(page.locator("#token-panel")).to_have_count(0)
    expect(piece_of(answer, last)).to_be_focused()


def test_tokens_by_keyboard_alone(page: Any, answer: Any) -> None:
    piece_of(answer, 0).focus()
    for _ in range(place_of(FORK)):
        page.keyboard.press("ArrowRight")
    expect(piece_of(answer, place_of(FORK))).to_be_focused()
    page.keyboard.press("Enter")
    panel = page.locator("#token-panel")
    expect(panel.locator(".alternatives li")).to_have_count(8)
    assert page.evaluate("document.getElementById('token-panel').contains(document.activeElement)")
    page.keyboard.press("ArrowLeft")
    expect(panel.locator(".token-text")).to_have_text("·we")
    page.keyboard.press("ArrowRight")
    expect(panel.locator(".alternatives li")).to_have_count(8)
    page.keyboard.press("Tab")
    expect(panel.locator(".pick").first).to_be_focused()
    page.keyboard.press("Enter")
    finished(page)
    page.locator("label", has=page.locator("#show-tokens")).click()
    expect(answer.locator(".body")).to_have_text(OTHER)


def test_alternatives_are_there_after_a_reload(page: Any, answer: Any) -> None:
    """They are not kept in the browser, but asked for again."""
    page.reload()
    piece_of(answer, place_of(FORK)).click()
    rows = page.locator("#token-panel .alternatives li")
    expect(rows).to_have_count(8)
    expect(rows.nth(1)).to_contain_text("dream")
    stored = page.evaluate("JSON.stringify(Object.entries(localStorage))")
    assert '"top"' not in json.dumps(json.loads(stored)).replace("\\", "")
