"""What once went wrong before somebody's eyes: refusals, breaks, odd texts, odd windows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.serve.browser.conftest import Guard
from tests.serve.browser.speaker import ANSWER
from tests.serve.browser.talk import ask, finished, said
from tests.serve.browser.test_inside import view
from tests.serve.browser.test_runs import Run, run  # noqa: F401

CHAT = "**/v1/chat/completions"


def answer_with(page: Any, pieces: list[str], end: str = "data: [DONE]\n\n") -> None:
    """Let the server's next answer be these tokens."""
    events = []
    for number, text in enumerate(pieces):
        entry = {"token": text, "token_id": number, "bytes": list(text.encode()), "logprob": -0.5}
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        choice["logprobs"] = {"content": [entry | {"top_logprobs": []}]}
        events.append({"choices": [choice], "prompt_token_ids": [1]})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end
    page.route(CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=body))


# ------------------------------------------------------------------------- refusals and breaks


@pytest.mark.parametrize(
    ("locale", "status", "words"),
    [("en-US", 429, "in 7 s"), ("ja-JP", 429, "7 秒"), ("en-US", 503, "shutting down")],
)
def test_a_busy_server_says_so(
    open_page: Callable[..., Any], guard: Guard, locale: str, status: int, words: str
) -> None:
    guard.expect(f"status of {status}")
    page = open_page(locale=locale)
    refusal = json.dumps({"error": {"message": "The server is shutting down."}})
    headers = {"Retry-After": "7"}
    page.route(CHAT, lambda route: route.fulfill(status=status, headers=headers, body=refusal))
    ask(page, "Hello")
    expect(page.locator(".message").get_by_role("alert")).to_contain_text(words)
    page.unroute(CHAT)
    page.locator(".retry").click()
    finished(page)
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)
    expect(page.locator(".versions")).to_have_count(0)


def test_an_answer_that_breaks_off_is_kept(page: Any) -> None:
    answer_with(page, ["Stars", " shine"], end="")
    ask(page, "Hello")
    answer = finished(page)
    expect(answer.locator(".body")).to_have_text("Stars shine")
    expect(answer.get_by_role("alert")).to_contain_text("broke off")
    expect(answer.locator(".go-on")).to_be_visible()


def test_failed_attempts_are_no_versions(page: Any, guard: Guard) -> None:
    guard.expect("ERR_INTERNET_DISCONNECTED")
    answer = said(page, "Hello", ANSWER)
    page.context.set_offline(True)
    for _ in range(2):
        answer.locator(".again").click()
        expect(answer.get_by_role("alert")).to_be_visible()
        expect(answer.locator(".versions")).to_contain_text("2/2")
    page.context.set_offline(False)
    answer.locator(".retry").click()
    finished(page)
    expect(answer.locator(".body")).to_have_text(ANSWER)
    expect(answer.locator(".versions")).to_contain_text("2/2")


def test_models_that_were_not_known_are_asked_for_again(
    open_page: Callable[..., Any], guard: Guard
) -> None:
    """Whoever sends a message after a refusal does not have to load the page anew for it."""
    guard.expect("status of 503")
    page = open_page(ready=False)
    page.route("**/api/page", lambda route: route.fulfill(status=503, body="{}"))
    page.reload()
    expect(page.locator("#notes")).to_contain_text("503")
    page.unroute("**/api/page")
    ask(page, "Hello")
    expect(page.locator("#model")).to_have_value("speaker")
    expect(page.locator("#notes .note")).to_have_count(0)
    expect(page.locator("#message")).to_have_value("Hello")
    page.locator("#message").press("Enter")
    finished(page)
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)


def test_an_embedding_model_is_not_asked_for_another_answer(page: Any) -> None:
    said(page, "Hello", ANSWER)
    models = page.evaluate("fetch('api/page').then((answer) => answer.json())")
    models["models"].append({**models["models"][0], "name": "reader", "kind": "embedder"})
    page.route("**/api/page", lambda route: route.fulfill(json=models))
    page.reload()
    page.locator("#model").select_option("reader")
    page.locator(".again").click()
    expect(page.locator("#notes")).to_contain_text("does not write")
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)
    expect(page.locator(".versions")).to_have_count(0)


# ------------------------------------------------------------------------- texts


def test_an_indent_stands_on_its_own_line(page: Any) -> None:
    """A token of a line end and spaces breaks the line before the spaces."""
    answer_with(page, ["if", "\n    ", "end", "\n"])
    page.locator("label", has=page.locator("#show-tokens")).click()
    ask(page, "Hello")
    pieces = finished(page).locator(".pieces")
    assert pieces.inner_text().strip() == "if↵\n····end↵"


def test_products_are_not_slanted(page: Any) -> None:
    text = "5*3*2 is 30, *really*, とても*大切*です."
    answer_with(page, [text])
    ask(page, "Hello")
    body = finished(page).locator(".body")
    expect(body).to_have_text("5*3*2 is 30, really, とても大切です.")
    expect(body.locator("em")).to_have_text(["really", "大切"])


# ------------------------------------------------------------------------- windows


def test_a_low_window_begins_at_the_top(open_page: Callable[..., Any]) -> None:
    """As at a zoom of 200 %."""
    page = open_page(viewport={"width": 640, "height": 420})
    expect(page.locator("#welcome h2")).to_be_in_viewport(ratio=1)


def test_the_map_stands_beside_what_belongs_to_it(open_page: Callable[..., Any]) -> None:
    page = open_page("/#inside", viewport={"width": 1300, "height": 900})
    view(page, "attention")
    heads, chart, frame = (
        page.locator(which).bounding_box()
        for which in ("#attention-heads", "#attention-map", "#inside-panel .scroll")
    )
    assert chart["x"] >= heads["x"] + heads["width"]
    for side, size in (("x", "width"), ("y", "height")):  # the focus' outline is 4 pixels wide
        assert frame[side] + 4 <= chart[side]
        assert chart[side] + chart[size] + 4 <= frame[side] + frame[size]


def test_the_chosen_column_of_the_lens_is_in_sight(open_page: Callable[..., Any]) -> None:
    page = open_page("/#inside", viewport={"width": 360, "height": 640})
    page.locator("#inside-text").fill("Stars shine while we sleep. 星は静かに光る")
    page.locator("#inside-look").click()
    view(page, "lens")
    cell = page.locator("#lens-table td[aria-selected=true]").bounding_box()
    assert cell["x"] >= 0 and cell["x"] + cell["width"] <= 360


def test_the_chart_says_how_it_is_used(open_page: Callable[..., Any], run: Run) -> None:  # noqa: F811
    page = open_page("/#runs")
    expect(page.locator("#run-readout")).to_contain_text("drag to zoom")
    page.locator("#language").click()
    expect(page.locator("#run-readout")).to_contain_text(re.compile("ドラッグ"))


def test_back_and_forward_walk_through_the_parts(page: Any) -> None:
    for tab in ("inside", "runs"):
        page.locator(f"#tab-{tab}").click()
        expect(page.locator(f"#{tab}")).to_be_visible()
    page.go_back()
    expect(page.locator("#inside")).to_be_visible()
    page.go_back()
    expect(page.locator("#chat")).to_be_visible()
    page.go_forward()
    expect(page.locator("#tab-inside")).to_have_attribute("aria-selected", "true")
