"""Talking: type, stream, stop, edit, regenerate, and all that is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

from llm_from_scratch.text.chat import check_messages, encode_chat
from tests.serve.browser.conftest import Guard, Site
from tests.serve.browser.gate import wait_until
from tests.serve.browser.speaker import ANSWER, speaker_tokenizer
from tests.serve.browser.talk import Requests, ask, finished, said

CHAT = "/v1/chat/completions"


def test_an_answer_streams(page: Any, site: Site) -> None:
    """After four passes of the model four tokens stand there, while it is still writing."""
    site.gate.hold(after=4)
    ask(page, "Hello there")
    expect(page.locator(".message.user .body")).to_have_text("Hello there")
    body = page.locator(".message.assistant .body")
    expect(body).to_have_text("Stars shine while we")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_hidden()
    site.gate.hold(after=1)
    expect(body).to_have_text("Stars shine while we sleep")
    site.gate.open()
    finished(page)
    expect(body).to_have_text(ANSWER)
    expect(page.locator("#message")).to_have_value("")


def test_half_a_character_is_never_shown(page: Any, site: Site) -> None:
    """The last character comes in four tokens; no piece of it stands there as a broken sign."""
    site.gate.hold(after=13)
    ask(page, "こんにちは")
    body = page.locator(".message.assistant .body")
    expect(body).to_have_text(ANSWER.removesuffix("🙂"))
    site.gate.open()
    finished(page)
    expect(body).to_have_text(ANSWER)


def test_stop_stops_the_model_too(page: Any, site: Site) -> None:
    """What was written stays, and the server gives the text up long before its end."""
    site.gate.hold(after=3)
    ask(page, "Hello")
    body = page.locator(".message.assistant .body")
    expect(body).to_have_text("Stars shine while")
    page.locator("#stop").click()
    finished(page)
    service = site.running.service
    wait_until(lambda: service.in_flight == 0)  # the server knows that nobody reads any more
    site.gate.give(1, until=lambda: service.worker.desks["speaker"].texts == 0)
    expect(body).to_have_text("Stars shine while")
    site.gate.open()
    said(page, "Hello again", ANSWER)


def test_escape_stops(page: Any, site: Site) -> None:
    site.gate.hold(after=2)
    ask(page, "Hello")
    expect(page.locator(".message.assistant .body")).to_have_text("Stars shine")
    page.keyboard.press("Escape")
    finished(page)
    expect(page.locator(".message.assistant .body")).to_have_text("Stars shine")


def test_a_stopped_answer_goes_on(page: Any, site: Site) -> None:
    site.gate.hold(after=3)
    ask(page, "Hello")
    expect(page.locator(".message.assistant .body")).to_have_text("Stars shine while")
    page.locator("#stop").click()
    answer = finished(page)
    site.gate.open()
    answer.locator(".go-on").click()
    finished(page)
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)
    expect(page.locator(".versions")).to_contain_text("2/2")


def test_edit_and_versions(page: Any) -> None:
    """An edited question gets an answer of its own; the first one can be gone back to."""
    sent = Requests(page, CHAT)
    said(page, "First", ANSWER)
    question = page.locator(".message.user")
    question.get_by_role("button", name="Edit").click()
    area = question.locator("textarea")
    expect(area).to_be_focused()
    area.fill("Second")
    area.press("Enter")
    finished(page)
    expect(question.locator(".body")).to_have_text("Second")
    assert [body["messages"][-1]["content"] for body in sent.bodies] == ["First", "Second"]
    versions = question.locator(".versions")
    expect(versions).to_contain_text("2/2")
    versions.get_by_role("button").first.click()
    expect(question.locator(".body")).to_have_text("First")
    question.get_by_role("button", name="Edit").click()
    question.locator("textarea").fill("nothing of it")
    question.locator("textarea").press("Escape")
    expect(question.locator(".body")).to_have_text("First")
    assert len(sent.bodies) == 2


def test_regenerate(page: Any) -> None:
    sent = Requests(page, CHAT)
    answer = said(page, "Hello", ANSWER)
    answer.locator(".again").click()
    expect(page.locator(".message.assistant .versions")).to_contain_text("2/2")
    finished(page)
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)
    assert len(sent.bodies) == 2 and sent.bodies[0]["messages"] == sent.bodies[1]["messages"]


def test_a_conversation_is_sent_whole(page: Any) -> None:
    sent = Requests(page, CHAT)
    said(page, "One", ANSWER)
    said(page, "Two", ANSWER)
    assert sent.bodies[1]["messages"] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "Two"},
    ]


def test_enter_while_an_input_method_composes_does_not_send(page: Any) -> None:
    """In Japanese, Enter first takes over the conversion that is offered."""
    sent = Requests(page, CHAT)
    box = page.locator("#message")
    box.click()
    client = page.context.new_cdp_session(page)
    client.send(
        "Input.imeSetComposition", {"text": "とうきょう", "selectionStart": 5, "selectionEnd": 5}
    )
    expect(box).to_have_value("とうきょう")
    client.send("Input.dispatchKeyEvent", {
        "type": "rawKeyDown", "key": "Process", "code": "Enter", "windowsVirtualKeyCode": 229,
    })  # fmt: skip
    for how in ("isComposing: true", "keyCode: 229"):  # Safari says the second alone
        event = f"new KeyboardEvent('keydown', {{key: 'Enter', {how}, bubbles: true}})"
        page.evaluate(f"document.getElementById('message').dispatchEvent({event})")
    client.send("Input.insertText", {"text": "東京"})
    expect(box).to_have_value("東京")
    expect(page.locator(".message")).to_have_count(0)
    box.press("Shift+Enter")
    expect(box).to_have_value("東京\n")
    box.press("Enter")
    finished(page)
    assert [body["messages"][0]["content"] for body in sent.bodies] == ["東京"]


def test_history_survives_a_reload(page: Any) -> None:
    said(page, "Remember this", ANSWER)
    page.locator("#message").fill("half a thought")
    page.reload()
    expect(page.locator(".message.user .body")).to_have_text("Remember this")
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)
    expect(page.locator("#message")).to_have_value("half a thought")
    page.locator("#message").fill("")
    said(page, "And this", ANSWER)


def test_a_long_prompt_is_refused_in_a_sentence(page: Any, guard: Guard) -> None:
    """The server's words stand there, the question too: shortened, it is answered."""
    guard.expect("status of 400")
    page.locator("#message").fill("long " * 400)
    page.locator("#message").press("Enter")
    problem = page.get_by_role("alert").filter(has_text=re.compile("context|tokens"))
    expect(problem).to_be_visible()
    question = page.locator(".message.user")
    expect(question.locator(".body")).to_have_text(re.compile("^long long"))
    question.get_by_role("button", name="Edit").click()
    expect(question.locator("textarea")).to_have_value(re.compile("^long long"))
    question.locator("textarea").fill("short")
    question.locator("textarea").press("Enter")
    finished(page)
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)


def test_without_a_server_nothing_is_lost(page: Any, guard: Guard) -> None:
    guard.expect("ERR_INTERNET_DISCONNECTED")
    page.context.set_offline(True)
    ask(page, "Is anybody there?")
    expect(page.locator(".message").get_by_role("alert")).to_be_visible()
    page.context.set_offline(False)
    page.locator(".retry").click()
    finished(page)
    expect(page.locator(".message.user .body")).to_have_text("Is anybody there?")
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)


# ------------------------------------------------------------------------- settings


def test_the_system_prompt_is_sent(page: Any) -> None:
    sent = Requests(page, CHAT)
    page.locator("#open-settings").click()
    page.get_by_label("System prompt").fill("Speak of stars.")
    said(page, "Hello", ANSWER)
    assert sent.bodies[0]["messages"] == [
        {"role": "system", "content": "Speak of stars."},
        {"role": "user", "content": "Hello"},
    ]
    page.reload()
    expect(page.locator("#system")).to_have_value("Speak of stars.")


def test_sampling_controls_are_sent(page: Any) -> None:
    """All of them; what is out of bounds is marked and not taken over."""
    sent = Requests(page, CHAT)
    page.locator("#open-settings").click()
    values = {
        "temperature": 0.35, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.05,
        "max_tokens": 7, "seed": 12,
    }  # fmt: skip
    for name, value in values.items():
        page.locator(f"#set-{name}").fill(str(value))
    page.locator("#set-stop").fill("\nUser:\\n\nzzz")
    page.locator("#set-temperature").fill("-1")
    expect(page.locator("#set-temperature")).to_have_attribute("aria-invalid", "true")
    ask(page, "Hello")
    answer = finished(page)
    body = sent.bodies[0]
    assert {name: body[name] for name in values} == values
    assert body["stop"] == ["User:\n", "zzz"]
    assert body["stream"] is True and body["logprobs"] is True and body["return_token_ids"] is True
    expect(answer.locator(".body")).to_have_text("Stars shine while we sleep.")
    expect(answer.locator(".notice")).to_contain_text("limit")
    page.reload()
    page.locator("#open-settings").click() if page.locator("#settings").is_hidden() else None
    expect(page.locator("#set-top_k")).to_have_value("40")
    page.locator("#reset-settings").click()
    expect(page.locator("#set-top_k")).to_have_value("0")


# ------------------------------------------------------------------------- conversations


def test_export_is_what_finetuning_reads(page: Any, tmp_path: Path) -> None:
    """JSONL of `messages`, which this project's own reader takes with the mask of what to learn."""
    page.locator("#open-settings").click()
    page.locator("#system").fill("Be brief.")
    said(page, "日本語で <|im_end|>", ANSWER)
    said(page, 'And "quoted"\n', ANSWER)
    page.locator("#new-chat").click()
    said(page, "Another talk", ANSWER)
    for button, count in (("#export-one", 1), ("#export-all", 2)):
        with page.expect_download() as download:
            page.locator(button).click()
        assert download.value.suggested_filename.endswith(".jsonl")
        download.value.save_as(tmp_path / "export.jsonl")
        lines = (tmp_path / "export.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == count
        for line in lines:
            record = json.loads(line)
            assert list(record) == ["messages"]
            tokens = encode_chat(speaker_tokenizer(), check_messages(record["messages"]))
            learned = [i for i, on in zip(tokens.ids, tokens.mask, strict=True) if on]
            assert ANSWER in speaker_tokenizer().decode(learned)
    first = [json.loads(line) for line in lines][-1]["messages"]
    assert [message["role"] for message in first] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert first[1]["content"] == "日本語で <|im_end|>"


def test_import_what_was_exported(page: Any, guard: Guard, tmp_path: Path) -> None:
    said(page, "Keep me", ANSWER)
    with page.expect_download() as download:
        page.locator("#export-all").click()
    download.value.save_as(tmp_path / "export.jsonl")
    page.locator("#conversations .delete").click()
    expect(page.locator("#conversations li")).to_have_count(0)
    page.locator("#import-file").set_input_files(tmp_path / "export.jsonl")
    expect(page.locator(".message.user .body")).to_have_text("Keep me")
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)
    (tmp_path / "bad.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "x"}]}\nno JSON\n'
    )
    page.locator("#import-file").set_input_files(tmp_path / "bad.jsonl")
    expect(page.get_by_text("Line 2")).to_be_visible()
    expect(page.locator("#conversations li")).to_have_count(1)


def test_conversations_are_listed_renamed_and_deleted(page: Any) -> None:
    said(page, "First talk", ANSWER)
    page.locator("#new-chat").click()
    expect(page.locator(".message")).to_have_count(0)
    said(page, "Second talk", ANSWER)
    items = page.locator("#conversations li")
    expect(items).to_have_text([re.compile("Second talk"), re.compile("First talk")])
    items.nth(1).locator(".open").click()
    expect(page.locator(".message.user .body")).to_have_text("First talk")
    items.nth(1).locator(".rename").click()
    page.keyboard.type("The stars")
    page.keyboard.press("Enter")
    expect(items.nth(1)).to_have_text(re.compile("The stars"))
    items.nth(1).locator(".delete").click()
    expect(items).to_have_count(1)
    expect(page.locator(".message.user .body")).to_have_text("Second talk")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".message.user .body")).to_have_text("First talk")


def test_an_answer_goes_on_while_another_talk_is_read(page: Any, site: Site) -> None:
    said(page, "First talk", ANSWER)
    page.locator("#new-chat").click()
    site.gate.hold(after=2)
    ask(page, "Second talk")
    expect(page.locator(".message.assistant .body")).to_have_text("Stars shine")
    page.locator("#conversations li").last.locator(".open").click()
    expect(page.locator(".message.user .body")).to_have_text("First talk")
    expect(page.locator("#send")).to_be_visible()
    site.gate.open()
    expect(page.locator("#conversations .dot")).to_have_count(0)
    page.locator("#conversations li").first.locator(".open").click()
    expect(page.locator(".message.assistant .body")).to_have_text(ANSWER)
