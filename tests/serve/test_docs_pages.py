"""/docs: every page in both languages, links that lead somewhere, nothing smuggled in by a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin

import httpx2
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from llm_from_scratch.serve import docs_pages, errors
from llm_from_scratch.serve.docs_pages import render
from llm_from_scratch.serve.service import Service
from tests.serve.servers import Running

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [(language, path) for language in ("en", "ja") for path in (DOCS / language).glob("*.md")]
VIEWS = ("tokens", "alternatives", "attention", "lens", "neighbours")  # as the page links to them


class Parts(HTMLParser):
    """What a page is made of: ids, links and the tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.links += [str(found[name]) for name in ("href", "src") if name in found]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI(docs_url=None, redirect_slashes=False)
    errors.install(app)
    app.include_router(docs_pages.router())
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def pages(client: TestClient) -> dict[str, Parts]:
    """Every page by its address, as it is served."""
    found = {}
    for language, path in PAGES:
        answer = client.get(f"/docs/{language}/{path.stem}")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert f'<html lang="{language}">' in answer.text
        found[f"/docs/{language}/{path.stem}"] = Parts(answer.text)
    return found


def test_links_between_pages_lead_somewhere(pages: dict[str, Parts], client: TestClient) -> None:
    others: set[str] = set()
    for address, parts in pages.items():
        assert len(parts.ids) == len(set(parts.ids)), address
        for link in parts.links:
            assert not link.startswith("/")  # a proxy may have moved the server
            path, _, anchor = unquote(urljoin(address, link)).partition("#")
            if re.match(r"https?://", link) or path in ("/", "/page/icon.svg"):
                continue
            assert path.startswith("/docs/"), (address, link)
            if path in pages:
                assert not anchor or anchor in pages[path].ids, (address, link)
            else:
                others.add(path)
    sources = {f"/docs/source/{name}" for name in docs_pages.sources()}
    assert "/docs/source/llm_from_scratch/model/layers.py" in others & sources
    assert "/docs/images/attention.png" in others - sources
    for path in [*(others - sources), *sorted(others & sources)[:3]]:
        assert client.get(path).status_code == 200, path


def test_nothing_that_the_policy_forbids(pages: dict[str, Parts]) -> None:
    for parts in pages.values():
        for tag, attributes in parts.tags:
            assert tag not in ("script", "style", "iframe", "form")
            assert not any(name == "style" or name.startswith("on") for name in attributes)


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_views_have_their_headings(language: str, pages: dict[str, Parts]) -> None:
    tags = pages[f"/docs/{language}/inside"].tags
    assert {a["id"] for tag, a in tags if tag == "h2"} >= set(VIEWS)


def test_what_the_markdown_becomes() -> None:
    title, html = render(
        """# A *title* & `code`

<!-- a remark -->
<a id="own"></a>

## 注意機構：何を見るか

[a](model.md#x) [b](../ja/model.md) [c](../../llm_from_scratch/model/layers.py) [d](../../LICENSE)
[e](https://example.org/?a=1&b=2) [f](javascript:alert) [g](../../../secret.md) [h](#own)
![picture](../images/attention.png) ![gone](../images/../../x.png)

## 注意機構：何を見るか

| a | b |
|---|--:|
| $x_i + y_i$ | `<b>` |

<script>alert(1)</script> <a href="x">raw</a> <b onclick=x>b</b>

$$L = \\sum_i a_i$$

A price of $5 and $6, `$HOME`, [$x$](index.md).

```python
x = "<a id=\\"own\\"></a>" if 1 < 2 else None
```

```nothing
<!-- kept -->
```
""",
        "docs/en/test.md",
    )
    parts = Parts(html)
    assert title == "A title & code"
    assert parts.ids == ["a-title--code", "own", "注意機構何を見るか"]
    assert parts.links == [
        "../../docs/en/model#x", "../../docs/ja/model",
        "../../docs/source/llm_from_scratch/model/layers.py", "https://example.org/?a=1&b=2",
        "#own", "../../docs/images/attention.png", "../../docs/en/index",
    ]  # fmt: skip
    assert {tag for tag, _ in parts.tags} <= {
        "h1", "h2", "em", "code", "p", "a", "img", "table", "thead", "tbody", "tr", "th", "td",
        "pre", "span",
    }  # fmt: skip
    assert 'alt="picture"' in html and " gone</p>" in html.replace("\n", " ")
    assert "remark" not in html and "&lt;!-- kept --&gt;" in html
    assert '<td class="right"><code>&lt;b&gt;</code></td>' in html
    assert '<code class="formula">x_i + y_i</code>' in html
    assert '<code class="formula">L = \\sum_i a_i</code>' in html
    assert "A price of $5 and $6" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "<code>$HOME</code>" in html


def test_lines_of_japanese_are_joined_without_a_space() -> None:
    text = "日本語の文が\n続きます。\nそして `x`\nと（*括弧*）\n「鉤」と word\nword"
    html = render(text, "docs/ja/test.md")[1]
    assert html == (
        "<p>日本語の文が続きます。そして <code>x</code>\n"
        "と（<em>括弧</em>）「鉤」と word\nword</p>\n"
    )


def test_redirects_and_the_style_sheet(client: TestClient) -> None:
    for path, to in (("", "en"), ("/", "en"), ("/en", "en"), ("/ja", "ja"), ("/ja/", "ja")):
        answer = client.get(f"/docs{path}", follow_redirects=False)
        location = urljoin(f"/docs{path}", answer.headers["location"])
        assert (answer.status_code, location) == (307, f"/docs/{to}/index")
    style = client.get("/docs/style.css")
    assert style.headers["content-type"].startswith("text/css")
    assert "code .k {" in style.text and "prefers-color-scheme: dark" in style.text
    assert not re.search(r"url\(|@import|https?:", style.text)  # nothing from elsewhere
    assert client.get("/docs/en/model.md").status_code == 200


def test_source_files_have_numbered_lines(client: TestClient) -> None:
    text = client.get("/docs/source/llm_from_scratch/model/attend.py").text
    source = Path(docs_pages.PACKAGE / "model" / "attend.py").read_text(encoding="utf-8")
    assert Parts(text).ids == [f"L{n}" for n in range(1, source.count("\n") + 1)]
    shown = re.sub(r"<[^>]+>", "", text.partition("<code>")[2].partition("</code>")[0])
    assert unescape(shown) == source
    links = {urljoin("/docs/source/llm_from_scratch/model/attend.py", x) for x in Parts(text).links}
    assert links == {"/", "/page/icon.svg", "/docs/style.css"}


@pytest.mark.parametrize(
    "path",
    [
        "/en/nothing", "/fr/index", "/fr", "/en/../../pyproject", "/en/..%2f..%2fREADME",
        "/en/%2e%2e/%2e%2e/README", "/images/draw.py", "/images/..%2fen%2findex.md",
        "/images/nothing.png", "/source/llm_from_scratch/../pyproject.toml", "/source//etc/passwd",
        "/source/llm_from_scratch", "/source/", "/source/%00", "/en/index%00", "/en/" + "x" * 3000,
        "/source/llm_from_scratch/model/__pycache__/layers.cpython-311.pyc",
    ],
)  # fmt: skip
def test_only_what_is_listed_is_served(path: str, client: TestClient) -> None:
    answer = client.get(f"/docs{path}")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 300


def test_a_page_that_was_edited_and_no_pages_at_all(
    tmp_path: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "docs"
    for language in ("en", "ja"):
        (folder / language).mkdir(parents=True)
        (folder / language / "index.md").write_text("# One\n", encoding="utf-8")
    monkeypatch.setattr(docs_pages, "docs_folder", lambda: folder)
    assert "<title>One" in client.get("/docs/en/index").text
    (folder / "en" / "index.md").write_text("# Two <&>\n", encoding="utf-8")
    assert "<title>Two &lt;&amp;&gt;" in client.get("/docs/en/index").text
    monkeypatch.setattr(docs_pages, "docs_folder", lambda: None)
    answer = client.get("/docs/en/index")
    assert answer.status_code == 404 and "not installed" in answer.json()["error"]["message"]


def test_the_documentation_is_open_and_guarded(
    service: Service, start: Callable[..., Running]
) -> None:
    """On a real server: no key is wanted, and the policy for pages stands."""
    service.keys = ("secret",)
    with httpx2.Client(base_url=start(service).address) as client:
        assert client.get("/api/page").status_code == 401
        for path in ("/docs/ja/inside", "/docs/style.css", "/docs/images/attention.png"):
            answer = client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self'" in policy and "unsafe-inline" not in policy
