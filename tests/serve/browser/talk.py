"""What the tests of the page do again and again."""

from __future__ import annotations

import json
from typing import Any

from playwright.sync_api import expect


def ask(page: Any, text: str) -> None:
    """Type a message and send it with Enter."""
    box = page.locator("#message")
    box.click()
    box.press_sequentially(text)
    box.press("Enter")


def finished(page: Any, answers: int = 1) -> Any:
    """Wait until so many answers stand there and nothing is being written; the last of them."""
    expect(page.locator(".message.assistant")).to_have_count(answers)
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()
    return page.locator(".message.assistant").last


def said(page: Any, text: str, answer: str) -> Any:
    """Ask, and wait for the answer, which must be this."""
    count = page.locator(".message.assistant").count()
    ask(page, text)
    found = finished(page, count + 1)
    expect(found.locator(".body")).to_have_text(answer)
    return found


class Requests:
    """What the page sends to some address: the bodies, as they go out."""

    def __init__(self, page: Any, path: str) -> None:
        self.bodies: list[dict[str, Any]] = []
        page.on("request", lambda request: self._note(request, path))

    def _note(self, request: Any, path: str) -> None:
        if request.url.endswith(path):
            self.bodies.append(json.loads(request.post_data))
