"""Takes page-*.png anew: starts the server with real models, and photographs its page in Chromium.

Wants the development tools, Debian's chromium and the model smollm2-135m (scratchlm pull
smollm2-135m). Seeds are fixed; it takes about two minutes, most of them for training the two small
models whose curves are shown. Some of them alone: python docs/images/page.py chat phone
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from tests.serve.browser.browsers import launch_options  # noqa: E402
from tests.serve.servers import process  # noqa: E402

MODEL = "smollm2-135m"
DESK = {"width": 1180, "height": 820}
PHONE = {"width": 390, "height": 780}
ENGLISH = {"viewport": DESK, "locale": "en-US", "color_scheme": "light"}
JAPANESE = {"viewport": DESK, "locale": "ja-JP", "color_scheme": "dark"}
LARGEST = 250_000  # bytes


def main() -> None:
    shots = {shot.__name__: shot for shot in (chat, attention, lens, runs, phone)}
    wanted = sys.argv[1:] or list(shots)
    with tempfile.TemporaryDirectory() as folder:
        if "runs" in wanted:
            train_runs(Path(folder))
        arguments = [MODEL, "--device", "cpu", "--runs", folder]
        with process(arguments) as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(**launch_options())
            for name in wanted:
                shots[name](browser, server.address)
            browser.close()


def train_runs(folder: Path) -> None:
    """One run that is finished, and one that is under way: two widths, on this documentation."""
    common = f"""pretrain --data {ROOT}/docs/ja --data.language ja --data.seq_len 128
        --tokenizer.vocab_size 1500 --model.n_layers 2 --model.n_heads 2 --train.max_steps 300
        --train.batch_size 8 --train.eval_every 50 --train.sample_every 100 --train.device cpu"""
    for name, more in (
        ("width-64", "--model.d_model 64"),
        ("width-160", "--model.d_model 160 --train.stop_after 210"),
    ):
        words = [*common.split(), *more.split(), "--out", str(folder / name)]
        subprocess.run([sys.executable, "-m", "llm_from_scratch", *words], check=True, cwd=ROOT)


@contextmanager
def page_of(browser: Any, address: str, tab: str, **how: Any) -> Iterator[Any]:
    context = browser.new_context(device_scale_factor=1.5, reduced_motion="reduce", **how)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(f"{address}/#{tab}")
    expect(page.locator("#model")).to_have_value(MODEL)
    yield page
    context.close()


def keep(page: Any, name: str) -> None:
    """Save what is seen, with 256 colours."""
    page.mouse.move(0, 0)
    page.evaluate(
        "document.activeElement.matches('#token-panel *') || document.activeElement.blur()"
    )
    path = HERE / f"page-{name}.png"
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    size = path.stat().st_size
    assert size <= LARGEST, f"{path} has {size:,} bytes"
    print(f"{path.name}: {size:,} bytes")


def ask(page: Any, text: str) -> None:
    """Send a message with the likeliest answer, which is the same every time."""
    page.evaluate(
        """() => localStorage.setItem("scratchlm.settings", JSON.stringify({
            temperature: 0, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: 60,
            seed: 1, stop: "", form: "auto" }))"""
    )
    page.reload()
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_visible(timeout=120_000)


def open_alternatives(page: Any, least: float) -> None:
    """Show tokens, and what else could have stood in place of the first that was a close call."""
    page.locator("label", has=page.locator("#show-tokens")).click()
    pieces = page.locator(".piece")
    for place in range(4, pieces.count()):
        share = float(re.findall(r"([\d.]+) %", pieces.nth(place).get_attribute("title"))[0])
        if share < least and pieces.nth(place).inner_text().strip().isalpha():
            break
    pieces.nth(place).click()
    expect(page.locator("#token-panel .alternatives li")).to_have_count(8)


def chat(browser: Any, address: str) -> None:
    with page_of(browser, address, "chat", **ENGLISH) as page:
        ask(page, "What is a language model? Answer in one sentence.")
        open_alternatives(page, 45)
        keep(page, "chat")


def look_into(page: Any, text: str, view: str) -> None:
    page.locator("#inside-text").fill(text)
    page.locator("#inside-form button[type=submit]").click()
    page.locator(f"#inside-tab-{view}").click()
    settle(page)


def settle(page: Any) -> None:
    """Wait for what the page has asked the server for."""
    expect(page.locator("#inside [aria-busy=true]")).to_have_count(0)


def to_top(page: Any, selector: str) -> None:
    """Scroll to something, with a little room above it."""
    page.locator(selector).first.evaluate(
        "one => { one.style.scrollMarginTop = '10px'; one.scrollIntoView(); }"
    )


def attention(browser: Any, address: str) -> None:
    """The head that connects "it" with "cat" most."""
    with page_of(browser, address, "inside", **ENGLISH) as page:
        look_into(page, "The cat sat on the mat because it was tired.", "attention")
        layer, head, _ = page.evaluate(STRONGEST, {"model": MODEL, "looks": " it", "at": " cat"})
        slider = page.locator("#attention-layer")
        slider.focus()
        slider.press("Home")
        for _ in range(layer):
            slider.press("ArrowRight")
        settle(page)
        page.locator("#attention-heads [role=option]").nth(head).click()
        page.locator("#inside-panel .strip .token").nth(7).click()
        page.locator("#attention-map").focus()
        page.keyboard.press("ArrowRight")  # from the first column to that of "cat"
        expect(page.locator("#attention-readout")).to_contain_text("“·it” → “·cat”")
        to_top(page, "#inside-panel .controls")
        keep(page, "attention")


STRONGEST = """async ({ model, looks, at }) => {
    const post = async (path, body) => (await fetch(`api/inside/${path}`, { method: "POST",
        headers: { "Content-Type": "application/json" }, body: JSON.stringify({ model, ...body }),
    })).json();
    const text = document.getElementById("inside-text").value;
    const { tokens } = await post("tokens", { text });
    const [row, column] = [looks, at].map((one) => tokens.findIndex(({ text }) => text === one));
    const { models } = await (await fetch("api/page")).json();
    const { layers, heads } = models.find(({ name }) => name === model);
    let best = [0, 0, -1];
    for (let layer = 0; layer < layers; layer++) {
        const { weights } = await post("attention", { ids: tokens.map(({ id }) => id), layer });
        const bytes = Uint8Array.from(atob(weights), (sign) => sign.charCodeAt(0));
        const shares = new Uint16Array(bytes.buffer);
        for (let head = 0; head < heads; head++) {
            const share = shares[(head * tokens.length + row) * tokens.length + column];
            if (share > best[2]) best = [layer, head, share];
        }
    }
    return best;
}"""


def lens(browser: Any, address: str) -> None:
    tall = {**JAPANESE, "viewport": {**DESK, "height": 1370}}  # for all 30 layers
    with page_of(browser, address, "inside", **tall) as page:
        look_into(page, "The capital of France is Paris, and the capital of Japan is", "lens")
        expect(page.locator("#lens-table")).to_be_visible()
        to_top(page, "#inside-panel .about")
        keep(page, "lens")


def runs(browser: Any, address: str) -> None:
    with page_of(browser, address, "runs", **JAPANESE) as page:
        boxes = page.locator("#run-list tbody input")
        expect(boxes).to_have_count(2)
        for place in range(2):
            boxes.nth(place).check()
        expect(page.locator("#runs path.raw")).to_have_count(2)
        page.get_by_role("application").focus()
        for key in ["Home", *["ArrowRight"] * 40]:
            page.keyboard.press(key)
        to_top(page, "#run-list")
        keep(page, "runs")


def phone(browser: Any, address: str) -> None:
    how = {**JAPANESE, "viewport": PHONE, "is_mobile": True, "has_touch": True}
    with page_of(browser, address, "chat", **how) as page:
        ask(page, "Name three colours of the sky.")
        open_alternatives(page, 60)
        keep(page, "phone")


if __name__ == "__main__":
    main()
