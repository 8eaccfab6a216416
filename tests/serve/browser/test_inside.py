"""See inside: tokens, next tokens, attention, the logit lens, neighbours."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.serve.browser.speaker import ANSWER, BRANCH, speaker_tokenizer
from tests.serve.browser.talk import said

TEXT = "Stars shine while we"
VIEWS = ("tokens", "alternatives", "attention", "lens", "neighbours")


@pytest.fixture
def inside(page: Any) -> Any:
    """The page with a text to look into."""
    page.locator("#tab-inside").click()
    page.locator("#inside-text").fill(TEXT)
    page.locator("#inside-form button[type=submit]").click()
    expect(page.locator("#token-count")).to_contain_text("4 tokens for 20 characters")
    return page


def view(page: Any, name: str) -> Any:
    """Choose a view, and wait until it has what it asked the server for."""
    page.locator(f"#inside-tab-{name}").click()
    expect(page.locator(f"#inside-tab-{name}")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#inside [aria-busy=true]")).to_have_count(0)
    return page.locator("#inside-panel")


def test_tokens_with_their_ids(inside: Any) -> None:
    ids = speaker_tokenizer().encode(TEXT)
    tokens = inside.locator("#token-list .token")
    expect(tokens).to_have_count(len(ids))
    for place, number in enumerate(ids):
        expect(tokens.nth(place).locator(".id")).to_have_text(str(number))
    tokens.nth(1).click()
    expect(inside.locator("#token-chosen")).to_contain_text(str(ids[1]))
    inside.keyboard.press("ArrowRight")
    expect(inside.locator("#token-chosen")).to_contain_text(str(ids[2]))


def test_every_view_says_what_it_shows(inside: Any) -> None:
    """In two sentences, with a link to a chapter that is there."""
    for name in VIEWS:
        panel = view(inside, name)
        about = panel.locator(".about")
        expect(about).to_be_visible()
        link = about.locator("a")
        words = about.inner_text().removesuffix(link.inner_text())
        assert len(re.findall(r"[.!?)](?=\s|$)", words)) == 2, words
        address, _, chapter = link.evaluate("link => link.href").partition("#")
        answer = inside.request.get(address)
        assert answer.ok and re.search(rf'id="{chapter}"', answer.text()), (address, chapter)


def test_next_tokens(inside: Any) -> None:
    view(inside, "alternatives")
    tokens = inside.locator("#alternatives-written .token")
    expect(tokens.first).to_have_text("·sleep")
    expect(inside.locator("#alternatives-more")).to_be_disabled()  # the text has ended
    tokens.first.click()
    rows = inside.locator("#alternatives-list li")
    expect(rows).to_have_count(8)
    expect(rows.first).to_contain_text("100.0 %")
    expect(rows.nth(1)).to_contain_text("dream")
    rows.nth(1).locator("button").click()
    expect(tokens).to_have_text(["·dream", "·of", "·cats", "!"])


def test_attention(inside: Any) -> None:
    view(inside, "attention")
    readout = inside.locator("#attention-readout")
    expect(inside.locator("#attention-heads").get_by_role("option")).to_have_count(4)
    tokens = inside.locator("#inside-panel .strip .token")
    expect(tokens).to_have_count(4)
    tokens.first.click()  # the first token can look at itself alone
    expect(readout).to_have_text("Head 1: “Stars” → “Stars”: 100.0 %")
    inside.locator("#attention-heads").get_by_role("option").nth(2).click()
    expect(readout).to_contain_text("Head 3")
    tokens.last.click()
    shares = []
    inside.locator("#attention-map").focus()
    for word in ("Stars", "·shine", "·while", "·we"):
        expect(readout).to_contain_text(f"“·we” → “{word}”")
        shares.append(float(re.findall(r"([\d.]+) %", readout.inner_text())[0]))
        inside.keyboard.press("ArrowRight")
    assert abs(sum(shares) - 100) < 0.3, shares
    layer = inside.locator("#attention-layer")
    layer.focus()
    before = readout.inner_text()
    layer.press("Home")
    expect(inside.locator("output[for=attention-layer]")).to_have_text("1 of 3")
    expect(readout).not_to_have_text(before)
    assert inside.evaluate("probes.colours('#attention-map')") > 3


def test_the_logit_lens(inside: Any) -> None:
    view(inside, "lens")
    rows = inside.locator("#lens-table tbody tr")
    expect(rows).to_have_count(4)  # the embedding and three layers
    expect(rows.last.get_by_role("gridcell")).to_have_text(["·shine", "·while", "·we", "·sleep"])
    expect(rows.last.locator(".right")).to_have_count(3)
    expect(inside.locator("#lens-cell li").first).to_contain_text("sleep")
    expect(inside.locator("#lens-cell li").nth(1)).to_contain_text("dream")
    rows.last.get_by_role("gridcell").last.focus()
    inside.keyboard.press("ArrowUp")
    inside.keyboard.press("ArrowLeft")
    expect(inside.locator("#lens-cell h4")).to_contain_text("“·while”")


def test_neighbours(inside: Any) -> None:
    view(inside, "neighbours")
    items = inside.locator("#neighbours-list li")
    expect(items).to_have_count(12)
    title = inside.locator("#neighbours-list h4")
    expect(title).to_contain_text("“·we”")
    items.first.locator("button").click()
    expect(title).not_to_contain_text("“·we”")
    expect(inside.locator(".trail li")).to_have_count(2)
    inside.locator("#neighbours-text").fill(BRANCH)
    inside.locator("#neighbours-text").press("Enter")
    expect(title).to_contain_text(f"id {speaker_tokenizer().encode(BRANCH)[0]}")


def test_the_conversation_from_the_chat(page: Any) -> None:
    """Exactly the ids that the model saw and wrote, control tokens included."""
    said(page, "Hello", ANSWER)
    page.locator("#tab-inside").click()
    expect(page.locator("#token-list .token.special").first).to_contain_text("<|im_start|>")
    expect(page.locator("#inside-text")).to_have_value(re.compile("assistant\nStars shine"))
    count = len(speaker_tokenizer().encode(ANSWER))
    shown = page.locator("#token-list .token .id").all_inner_texts()
    assert [int(number) for number in shown[-count:]] == speaker_tokenizer().encode(ANSWER)


def test_another_model_is_looked_into_at_once(inside: Any) -> None:
    inside.locator("#model").select_option("base")
    expect(inside.locator("#token-count")).not_to_contain_text("4 tokens for")
    view(inside, "attention")
    expect(inside.locator("#attention-heads").get_by_role("option")).to_have_count(6)


def test_refusals_are_shown(open_page: Callable[..., Any], guard: Any) -> None:
    guard.expect("ERR_INTERNET_DISCONNECTED")
    page = open_page("/#inside")
    expect(page.locator("#token-list .token").first).to_be_visible()
    page.context.set_offline(True)
    view(page, "lens")
    expect(page.locator("#inside-panel").get_by_role("alert")).to_be_visible()
