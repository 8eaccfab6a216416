"""A browser, a server with a model to talk to, and pages that are watched for every mishap."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import give_engine, open_models, serve_model
from llm_from_scratch.serve.service import make_service
from llm_from_scratch.text.training import train_tokenizer
from tests.generate.conftest import TEXT, make_model
from tests.serve.browser.browsers import launch_options, why_no_browser
from tests.serve.browser.gate import Gate
from tests.serve.browser.speaker import save_speaker
from tests.serve.servers import Running, running

try:
    from playwright.sync_api import expect
except ImportError:  # then the summary below says so
    collect_ignore_glob = ["test_*.py"]
else:
    expect.set_options(timeout=20_000)  # of patience where a machine is busy; nothing is measured

PROBES = Path(__file__).with_name("probes.js")
SKIPPED = "browser tests skipped"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one line that the page was not tested, so that nobody takes it for tested."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [str(report.longrepr[2]) for report in skipped if isinstance(report.longrepr, tuple)]
    count = sum(SKIPPED in reason for reason in reasons)
    missing = why_no_browser()
    if missing is not None and (count or "collect_ignore_glob" in globals()):
        how_many = f" ({count} tests)" if count else ""
        terminalreporter.write_line(f"{SKIPPED}{how_many}: {missing}", yellow=True, bold=True)


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """One Chromium for all tests here. (Playwright keeps an event loop running in this thread, so
    it has to end with this folder: other tests start loops of their own.)"""
    if (missing := why_no_browser()) is not None:
        pytest.skip(f"{SKIPPED}: {missing}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        yield browser
        browser.close()


# ------------------------------------------------------------------------- the server


@dataclass
class Site:
    """The server that all tests here share."""

    address: str
    gate: Gate
    runs: Path
    running: Running


@pytest.fixture(scope="package")
def speaker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("models") / "speaker")


@pytest.fixture(scope="package")
def site(
    browser: Any, speaker_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """Serves "speaker", a chat model, and "base", which has no chat template."""
    runs: Path = tmp_path_factory.mktemp("runs")
    limits = Limits(cache_tokens=4096)
    models = open_models([f"speaker={speaker_folder}"], limits)
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    base = serve_model(make_model(vocab_size=300, max_seq_len=120), tokenizer, "base")
    give_engine(base, limits)
    models["base"] = base
    speaker = models["speaker"].engine
    assert speaker is not None
    gate = Gate(speaker.engine)
    with running(make_service(models, limits, runs=runs)) as server:
        yield Site(server.address, gate, runs, server)


# ------------------------------------------------------------------------- watching pages


@dataclass
class Guard:
    """What went wrong in the pages of one test, and what it expects to go wrong."""

    addresses: list[str]
    mishaps: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def expect(self, pattern: str) -> None:
        """Let a mishap be that the pattern is found in; the browser reports refusals, too."""
        self.expected.append(pattern)

    def watch(self, context: Any) -> None:
        context.on("request", lambda request: self._request(request.url))
        context.on("console", self._console)
        context.on("weberror", lambda error: self._note(f"page error: {error.error}"))

    def _request(self, url: str) -> None:
        where = urlsplit(url)
        own = f"{where.scheme}://{where.netloc}" in self.addresses
        if not own and where.scheme not in ("data", "blob"):
            self._note(f"request leaves the server: {url}")

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning", "assert"):
            self._note(f"console {message.type}: {message.text} ({message.location.get('url')})")

    def _note(self, mishap: str) -> None:
        self.mishaps.append(mishap)

    def check(self) -> None:
        known = [re.compile(pattern) for pattern in self.expected]
        unknown = [one for one in self.mishaps if not any(each.search(one) for each in known)]
        assert not unknown, "\n".join(unknown)


@pytest.fixture
def guard(site: Site) -> Iterator[Guard]:
    """Watches every page of a test; the test fails at its end if something went wrong in one."""
    guard = Guard([site.address])
    yield guard
    guard.check()


@pytest.fixture
def open_page(browser: Any, site: Site, guard: Guard) -> Iterator[Callable[..., Any]]:
    """open_page(path, address, **options) opens a page in a fresh, watched browser context.

    The options are Playwright's: viewport, color_scheme, locale, ...
    """
    contexts = []

    def open_page(
        path: str = "/", address: str | None = None, ready: bool = True, **options: Any
    ) -> Any:
        how = {"viewport": {"width": 1180, "height": 800}, "locale": "en-US", **options}
        context = browser.new_context(**how, reduced_motion="reduce", accept_downloads=True)
        context.set_default_timeout(20_000)
        context.add_init_script(path=PROBES)
        contexts.append(context)
        guard.watch(context)
        page = context.new_page()
        page.goto((address or site.address) + path)
        if ready:  # the models are known
            expect(page.locator("#model option[value]")).not_to_have_count(0)
        return page

    site.gate.open()
    yield open_page
    site.gate.open()
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    """The page in English on a desk, on light ground, with nothing said yet."""
    return open_page()
