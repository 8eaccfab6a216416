"""The page as a whole: languages, colours, phones, keyboards, keys, and that nothing leaves it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import open_models
from llm_from_scratch.serve.service import make_service
from tests.serve.browser.conftest import Guard, Site
from tests.serve.browser.speaker import ANSWER
from tests.serve.browser.talk import Requests, ask, finished, said
from tests.serve.browser.test_inside import VIEWS, view
from tests.serve.browser.test_runs import Run
from tests.serve.servers import running

PHONE = {"width": 360, "height": 640}
JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")


# ------------------------------------------------------------------------- languages


def test_switch_the_language(page: Any) -> None:
    """Everything changes at once, the talk stays, and the choice is remembered."""
    said(page, "Hello", ANSWER)
    expect(page.locator("html")).to_have_attribute("lang", "en")
    page.get_by_role("button", name="日本語に切り替える").click()
    expect(page.locator("html")).to_have_attribute("lang", "ja")
    expect(page.locator("#tab-inside")).to_have_text("中を見る")
    expect(page.locator("#message")).to_have_attribute("placeholder", JAPANESE)
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)
    page.locator("#tab-inside").click()
    expect(page.locator("#inside-tab-attention")).to_have_text("注意機構")
    expect(page.locator("#inside-panel .about")).to_contain_text(JAPANESE)
    page.reload()
    expect(page.locator("html")).to_have_attribute("lang", "ja")
    page.locator("#language").click()
    expect(page.locator("#inside-tab-attention")).to_have_text("Attention")


def test_the_browsers_language_comes_first(open_page: Callable[..., Any]) -> None:
    page = open_page(locale="ja-JP")
    expect(page.locator("#tab-chat")).to_have_text("チャット")
    for locale in ("de-DE", "en-GB"):
        expect(open_page(locale=locale).locator("#tab-chat")).to_have_text("Chat")


@pytest.mark.parametrize("locale", ["en-US", "ja-JP"])
def test_nothing_is_left_in_the_other_language(
    open_page: Callable[..., Any], locale: str, site: Site
) -> None:
    """What stands in the page's own texts, labels and hints; names and keys apart."""
    page = open_page(locale=locale)
    page.keyboard.press("s")
    found = page.evaluate("probes.texts()")
    page.locator("#tab-inside").click()
    for name in VIEWS:
        found += view(page, name).page.evaluate("probes.texts()")
    page.locator("#tab-runs").click()
    expect(page.locator("#runs-empty")).to_be_visible()
    found += page.evaluate("probes.texts()")
    if locale == "en-US":
        wrong = [text for text in found if JAPANESE.search(text)]
        allowed = {"日本語", "日本語に切り替える"}
    else:
        wrong = [t for t in found if re.search("[A-Za-z]{3,} [a-z]{2,} [a-z]{2,}", t)]
        allowed = {"Switch to English"}
    assert not [t for t in wrong if t not in allowed and "日本の首都" not in t], wrong


# ------------------------------------------------------------------------- colours


def test_dark_as_the_system_is_and_by_choice(open_page: Callable[..., Any]) -> None:
    page = open_page(color_scheme="dark")
    assert brightness(page) < 0.2
    page.emulate_media(color_scheme="light")
    assert brightness(page) > 0.8
    theme = page.locator("#theme")
    theme.click()  # light
    page.emulate_media(color_scheme="dark")
    assert brightness(page) > 0.8
    theme.click()  # dark
    page.emulate_media(color_scheme="light")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert brightness(page) < 0.2


def brightness(page: Any) -> float:
    """Of the page's ground, from 0 to 1."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(open_page: Callable[..., Any], scheme: str, site: Site) -> None:
    """Contrast of 4.5 to 1 or more (WCAG 2.2, AA), in every part of the page."""
    page = open_page(color_scheme=scheme, viewport={"width": 1400, "height": 900})
    weak = page.evaluate("probes.faint()")
    said(page, "Hello", ANSWER)
    weak += page.evaluate("probes.faint()")
    page.keyboard.press("Tab")
    page.locator("#show-tokens").check(force=True)
    page.locator(".piece").first.click()
    expect(page.locator("#token-panel .alternatives li")).to_have_count(8)
    weak += page.evaluate("probes.faint()")
    page.keyboard.press("Escape")
    page.locator("#tab-inside").click()
    for name in VIEWS:
        view(page, name)
        weak += page.evaluate("probes.faint()")
    assert not weak, "\n".join(sorted(set(weak)))


# ------------------------------------------------------------------------- phones


def assert_fits(page: Any) -> None:
    """Nothing is wider than the screen, and no control lies beside it."""
    width, wide, beside = page.evaluate("probes.widths()")
    assert wide <= width and not beside, (wide, width, beside)


def test_a_phone_shows_everything_in_its_width(
    open_page: Callable[..., Any], site: Site, tmp_path: Path
) -> None:
    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True)
    assert_fits(page)
    long = "https://example.org/" + "x" * 90 + "\n| a | b |\n```\n" + "y" * 90 + "\n```"
    page.locator("#message").fill(long)
    assert_fits(page)
    page.locator("#send").tap()
    finished(page)
    assert_fits(page)
    page.locator("label", has=page.locator("#show-tokens")).tap()
    page.locator(".piece").nth(4).tap()
    expect(page.locator("#token-panel .alternatives li")).to_have_count(8)
    assert_fits(page)
    panel = page.locator("#token-panel").bounding_box()
    assert panel["x"] >= 0 and panel["x"] + panel["width"] <= PHONE["width"]
    page.locator("#close-token").tap()
    for name in ("list", "settings"):
        page.locator(f"#open-{name}").tap()
        expect(page.locator(f"#{name}")).to_be_visible()
        assert_fits(page)
        page.locator(f"#close-{name}").tap()
        expect(page.locator(f"#{name}")).to_be_hidden()
    page.locator("#tab-inside").tap()
    for name in VIEWS:
        view(page, name)
        assert_fits(page)
    page.locator("#tab-runs").tap()
    assert_fits(page)


def test_runs_on_a_phone(open_page: Callable[..., Any], site: Site) -> None:
    run = Run(site.runs / ("a-rather-long-name-" * 4), 20)
    run.train(20)
    page = open_page("/#runs", viewport=PHONE)
    expect(page.locator("#runs path.raw")).to_be_attached()
    assert_fits(page)
    for path in run.folder.iterdir():
        path.unlink()
    run.folder.rmdir()


# ------------------------------------------------------------------------- keyboards


def tab_to(page: Any, selector: str, key: str = "Tab") -> None:
    """Press Tab until something has the focus; on the way every stop must be seen to have it."""
    for _ in range(60):
        page.keyboard.press(key)
        assert page.evaluate("probes.focusIsSeen()"), page.evaluate(
            "document.activeElement.outerHTML.slice(0, 200)"
        )
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"no way to {selector} by keyboard")


def test_by_keyboard_alone(page: Any, site: Site) -> None:
    """Write, stop, ask again, edit, look at tokens, change tabs and settings: no mouse."""
    press = page.keyboard.press
    tab_to(page, "#message")
    page.keyboard.type("Hello")
    site.gate.hold(after=2)
    press("Enter")
    expect(page.locator(".message.assistant .body")).to_have_text("Stars shine")
    press("Escape")
    finished(page)
    site.gate.open()
    tab_to(page, ".again", "Shift+Tab")
    press("Enter")
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)
    finished(page)
    tab_to(page, "#show-tokens")
    press("Space")
    tab_to(page, ".piece", "Shift+Tab")
    press("Enter")
    expect(page.locator("#token-panel")).to_be_visible()
    press("Escape")
    tab_to(page, "#tab-chat", "Shift+Tab")
    press("ArrowRight")
    expect(page.locator("#inside")).to_be_visible()
    expect(page.locator("#tab-inside")).to_be_focused()
    expect(page.locator("#token-list")).to_be_visible()
    tab_to(page, "#inside-tab-tokens")
    press("ArrowRight")
    press("ArrowRight")
    expect(page.locator("#attention-map")).to_be_visible()
    tab_to(page, "#attention-heads [role=option]")
    press("ArrowRight")
    expect(page.locator("#attention-readout")).to_contain_text("Head 2")


def test_shortcuts(page: Any) -> None:
    press = page.keyboard.press
    said(page, "Hello", ANSWER)
    page.locator("#tab-chat").focus()
    press("t")
    expect(page.locator(".piece").first).to_be_visible()
    press("s")
    expect(page.locator("#settings")).to_be_visible()
    press("c")
    expect(page.locator("#list")).to_be_hidden()
    press("e")
    expect(page.locator(".message.user textarea")).to_be_focused()
    page.keyboard.press("End")
    page.keyboard.type("n?/")  # letters are letters in a box
    expect(page.locator(".message.user textarea")).to_have_value("Hellon?/")
    press("Escape")
    page.locator("#tab-chat").focus()
    press("n")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#message")).to_be_focused()


def test_every_control_has_a_name(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 1400, "height": 900})
    said(page, "Hello", ANSWER)
    nameless = page.evaluate("probes.nameless()")
    page.locator("#tab-inside").click()
    for name in VIEWS:
        view(page, name)
        nameless += page.evaluate("probes.nameless()")
    page.locator("#tab-runs").click()
    assert not nameless + page.evaluate("probes.nameless()")


# ------------------------------------------------------------------------- keys, other models


@pytest.fixture
def locked(site: Site, guard: Guard, speaker_folder: Path) -> Iterator[str]:
    """The address of a server that wants a key."""
    limits = Limits(cache_tokens=1024)
    models = open_models([f"speaker={speaker_folder}"], limits)
    with running(make_service(models, limits, keys=("sesame",))) as server:
        guard.addresses.append(server.address)
        yield server.address


def test_a_key_is_asked_for_once(open_page: Callable[..., Any], guard: Guard, locked: str) -> None:
    guard.expect("status of 401")
    page = open_page(address=locked, ready=False)
    dialog = page.locator("#key-dialog")
    expect(dialog).to_be_visible()
    expect(page.locator("#key")).to_be_focused()
    page.locator("#key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-wrong")).to_be_visible()
    expect(page.locator("#key")).to_have_value("")
    page.locator("#key").fill("sesame")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).to_have_value("speaker")
    said(page, "Hello", ANSWER)
    page.reload()
    expect(page.locator("#model")).to_have_value("speaker")
    expect(dialog).to_be_hidden()
    stored = page.evaluate("JSON.stringify([Object.entries(localStorage), location.href])")
    assert "sesame" not in stored


def test_who_has_no_key_is_told(open_page: Callable[..., Any], guard: Guard, locked: str) -> None:
    guard.expect("status of 401")
    page = open_page(address=locked, ready=False)
    expect(page.locator("#key-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.get_by_text("The server wants a valid key.")).to_be_visible()


def test_a_model_without_a_chat_template_goes_on_with_the_text(page: Any) -> None:
    sent = Requests(page, "/v1/completions")
    page.locator("#model").select_option("base")
    page.keyboard.press("s")
    page.locator("#set-max_tokens").fill("5")
    ask(page, "Once upon")
    finished(page)
    (body,) = sent.bodies
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("base", "Once upon", 5)
    expect(page.locator(".message.assistant")).to_contain_text("5 tokens")


# ------------------------------------------------------------------------- nothing leaves it


def test_words_are_never_taken_for_html(page: Any) -> None:
    """Neither a person's nor a model's, in any form of Markdown."""
    evil = "<img src=x onerror=alert(1)> **<b>bold</b>** [go](javascript:alert(1)) ![x](//ex.org/x)"
    said(page, evil, ANSWER)
    lines = (
        '{"messages": [{"role": "user", "content": %s}, {"role": "assistant", "content": %s}]}\n'
    )
    quoted = '"' + evil.replace('"', "'") + '"'
    page.locator("#import-file").set_input_files(
        {
            "name": "evil.jsonl",
            "mimeType": "text/plain",
            "buffer": (lines % (quoted, quoted)).encode(),
        }
    )
    answer = page.locator(".message.assistant .body")
    expect(answer.locator("strong")).to_have_text("<b>bold</b>")
    expect(answer).to_contain_text("<img src=x onerror=alert(1)>")
    for tag in ("img", "iframe", "script", "b", "object"):
        expect(page.locator(f"#messages {tag}")).to_have_count(0)
    links = page.locator("#messages a")
    for place in range(links.count()):
        assert not links.nth(place).get_attribute("href").startswith("javascript:")


def test_what_the_guard_sees(browser: Any, site: Site) -> None:
    """That a request to elsewhere, an error or a warning would not have gone unnoticed."""
    guard = Guard([site.address])
    context = browser.new_context()
    guard.watch(context)
    page = context.new_page()
    page.goto("data:text/html,<p>")
    guard.check()
    outside = "fetch('https://example.org/').catch(() => 'refused')"
    assert page.evaluate(outside) == "refused"
    assert any("request leaves the server: https://example.org/" in one for one in guard.mishaps)
    page.goto(site.address)
    guard.mishaps.clear()
    assert page.evaluate(outside) == "refused"  # here by the page's own policy
    assert any("Content Security Policy" in one for one in guard.mishaps)
    guard.mishaps.clear()
    with page.expect_event("pageerror"):
        page.evaluate("setTimeout(() => { throw new Error('odd'); })")
    page.evaluate("console.error('bad')")
    page.evaluate("fetch('/page/missing.js')")
    assert [one.split(":")[0] for one in guard.mishaps] == [
        "page error",
        "console error",
        "console error",
    ]
    with pytest.raises(AssertionError, match="odd"):
        guard.check()
    context.close()
