"""The documentation as pages: this repository's Markdown, English and Japanese, from this machine.

`/docs/en/inside` is `docs/en/inside.md`. Links between pages, to pictures and to the package's own
source stay inside; a link to what is not served becomes plain text. HTML in the Markdown is not
passed through: of it only `<a id="name"></a>` has a meaning, which gives the heading below it that
name (the same in both languages, as GitHub does it, too).
"""

from __future__ import annotations

import html
import itertools
import posixpath
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from llm_from_scratch.serve.errors import ApiError

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

PACKAGE = Path(__file__).resolve().parents[1]
LANGUAGES = {"en": "English", "ja": "日本語"}
PICTURES = (".png", ".jpg", ".svg")
SOURCES = {".py": "python", ".cpp": "cpp", ".js": "javascript", ".css": "css", ".html": "html"}
STYLE = Path(__file__).with_name("docs.css")
ANCHOR = re.compile(r'<a id="([\w-]+)">\s*</a>')
COMMENT = re.compile(r"\s*<!--.*-->\s*", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\w)", re.DOTALL)
ROOT = "../../"  # from /docs/en/model to where the server begins, which a proxy may have moved
PAGE = """<!doctype html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · scratchlm</title>
<link rel="icon" href="{root}page/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="{root}docs/style.css">
</head>
<body>
<header><a href="{root}.">scratchlm</a><nav>{links}</nav></header>
<main>
{body}</main>
</body>
</html>
"""


# --- what there is -------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def docs_folder() -> Path | None:
    """Where the documentation lies: inside the installed package, or beside it in a checkout."""
    for folder in (PACKAGE / "serve" / "docs", PACKAGE.parent / "docs"):
        if all((folder / language / "index.md").is_file() for language in LANGUAGES):
            return folder
    return None


def listed(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """The files that may be served, by name: no path that a client sends is ever opened."""
    return {path.name: path for path in folder.iterdir() if path.suffix in endings}


@lru_cache(maxsize=1)
def sources() -> dict[str, Path]:
    """The package's source files, by their path in the repository."""
    return {
        path.relative_to(PACKAGE.parent).as_posix(): path
        for path in PACKAGE.rglob("*")
        if path.suffix in SOURCES and path.is_file()
    }


# --- Markdown to HTML ----------------------------------------------------------------------------


def coloured(code: str, language: str, _attributes: str = "") -> str:
    """Code as HTML whose classes the style sheet colours; "" where the language is not known."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return ""
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True)))


@lru_cache(maxsize=1)
def parser() -> MarkdownIt:
    """CommonMark with tables and formulas; what is HTML in it is shown as text or left out."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": True, "highlight": coloured}).enable("table")
    markdown.inline.ruler.before("escape", "formula", formula)
    renderer: Any = markdown.renderer
    for kind in ("html_block", "html_inline"):
        renderer.rules[kind] = lambda tokens, at, *_: shown_html(tokens[at].content)
    return markdown


def formula(state: StateInline, silent: bool) -> bool:
    """`$x$` and `$$x$$`: kept as it is written, so that no underscore in it becomes emphasis."""
    match = FORMULA.match(state.src, state.pos)
    if match is None:
        return False
    if not silent:
        token = state.push("code_inline", "code", 0)
        token.content = match[1] or match[2]
        token.attrSet("class", "formula")
    state.pos = match.end()
    return True


def shown_html(text: str) -> str:
    """HTML of a page's own is not trusted: it is shown, and comments are left out."""
    return "" if COMMENT.fullmatch(text) else html.escape(text)


def slug(title: str) -> str:
    """The name that GitHub gives a heading: letters of any script, digits, hyphens."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def plain(token: Token) -> str:
    """The text of a heading, without its marks."""
    return "".join(child.content for child in token.children or ())


def named(tokens: Sequence[Token]) -> list[Token]:
    """The tokens of a page whose headings have ids: their own, or that of an anchor above them."""
    kept: list[Token] = []
    given: str | None = None
    seen: dict[str, int] = {}
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            name = given or slug(plain(tokens[place + 1]))
            count = seen[name] = seen.get(name, -1) + 1
            token.attrSet("id", name if not count else f"{name}-{count}")
            given = None
        elif token.type == "inline" and (match := ANCHOR.fullmatch(token.content.strip())):
            given = match[1]
            kept.pop()  # the paragraph that opened for it
            tokens[place + 1].type = "gone"
            continue
        if token.type != "gone":
            kept.append(token)
    return kept


def target_of(link: str, page: str) -> str | None:
    """Where a link on `page` ("docs/en/model.md") leads here; None where it leads nowhere."""
    if re.match(r"https?:|#", link):
        return link
    path, mark, anchor = link.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    if match := re.fullmatch(r"docs/(\w+)/([\w-]+)\.md", path):
        return f"{ROOT}docs/{match[1]}/{match[2]}{mark}{anchor}"
    if path.startswith("docs/images/") and path.endswith(PICTURES):
        return f"{ROOT}{path}"
    return f"{ROOT}docs/source/{path}" if path in sources() else None


def led(tokens: Sequence[Token], page: str) -> None:
    """Links and pictures that lead where they are served; a policy without inline styles kept."""
    for token in tokens:
        joined(token.children or [])
        if token.attrGet("style"):  # how columns are aligned
            token.attrs = {"class": str(token.attrs["style"]).rpartition(":")[2]}
        gone = False
        for child in token.children or ():
            if child.type == "link_open":
                target = target_of(str(child.attrs["href"]), page)
                gone = target is None
                child.attrs["href"] = target or ""
                if (target or "").startswith("http"):
                    child.attrs["rel"] = "noreferrer"
            if child.type == "image":
                target = target_of(str(child.attrs["src"]), page)
                child.attrs["src"] = target or ""
                child.type = "image" if target else "text"  # what the picture would have shown
            if gone and child.type in ("link_open", "link_close"):
                gone = child.type == "link_open"
                child.type, child.content = "text", ""


def joined(children: Sequence[Token]) -> None:
    """Lines that end and begin in Japanese are one: a browser would set a space between them."""
    for place, child in enumerate(children):
        if child.type == "softbreak":
            before = "".join(one.content for one in children[:place])[-1:]
            after = "".join(one.content for one in children[place + 1 :])[:1]
            if is_wide(before) and is_wide(after):
                child.type = "text"


def is_wide(character: str) -> bool:
    """Whether a character is as wide as a Japanese one."""
    return bool(character) and unicodedata.east_asian_width(character) in "WF"


def render(text: str, page: str) -> tuple[str, str]:
    """(title, HTML) of a page's Markdown."""
    markdown = parser()
    environment: dict[str, Any] = {}
    tokens = named(markdown.parse(text, environment))
    led(tokens, page)
    title = next((plain(b) for a, b in itertools.pairwise(tokens) if a.tag == "h1"), "")
    return title, str(markdown.renderer.render(tokens, markdown.options, environment))


# --- routes --------------------------------------------------------------------------------------


@lru_cache(maxsize=128)
def page_html(path: Path, language: str, changed: int) -> str:
    """A whole page; `changed` (when the file did) lets an edit show."""
    title, body = render(path.read_text(encoding="utf-8"), f"docs/{language}/{path.name}")
    links = [
        f'<a href="{ROOT}docs/{language}/index">{"目次" if language == "ja" else "Contents"}</a>'
    ]
    for other, name in LANGUAGES.items():
        here = ' aria-current="true"' if other == language else ""
        link = f"{ROOT}docs/{other}/{path.stem}"
        links.append(f'<a href="{link}" lang="{other}" hreflang="{other}"{here}>{name}</a>')
    return PAGE.format(
        language=language, title=html.escape(title), links=" ".join(links), body=body, root=ROOT
    )


@lru_cache(maxsize=32)
def source_html(name: str, changed: int) -> str:
    """A source file with numbered lines, `#L12` leads to the twelfth."""
    path = sources()[name]
    text = path.read_text(encoding="utf-8")
    lines = (coloured(text, SOURCES[path.suffix]) or html.escape(text)).rstrip("\n").split("\n")
    rows = "\n".join(
        f'<span class="line" id="L{n}">{line}</span>' for n, line in enumerate(lines, 1)
    )
    body = f'<h1>{html.escape(name)}</h1>\n<pre class="source"><code>{rows}\n</code></pre>\n'
    root = "../" * (2 + name.count("/"))
    return PAGE.format(language="en", title=html.escape(name), links="", body=body, root=root)


@lru_cache(maxsize=1)
def style_sheet() -> str:
    """docs.css, and the colours of code by day and by night."""
    from pygments.formatters import HtmlFormatter

    def colours(style: str) -> str:
        formatter = HtmlFormatter(style=style, nobackground=True)
        lines = formatter.get_style_defs("code").split("\n")
        return "\n".join(line for line in lines if line.startswith("code ."))

    night = f"@media (prefers-color-scheme: dark) {{\n{colours('github-dark')}\n}}\n"
    return f"{STYLE.read_text(encoding='utf-8')}\n{colours('friendly')}\n{night}"


def found(files: dict[str, Path], name: str, what: str) -> Path:
    if name not in files:
        raise ApiError(404, f"There is no {what} '{name[:80]}' in the documentation.")
    return files[name]


def folder_of(part: str) -> Path:
    folder = docs_folder()
    if folder is None:
        raise ApiError(404, "The documentation is not installed beside this server.")
    return folder / part


def router(service: object = None) -> APIRouter:
    """The routes below /docs; they need nothing of the service."""
    routes = APIRouter(prefix="/docs", include_in_schema=False)

    @routes.get("")
    @routes.get("/")
    def index(request: Request) -> Response:
        return RedirectResponse("en/index" if request.url.path.endswith("/") else "docs/en/index")

    @routes.get("/style.css")
    def style() -> Response:
        return Response(style_sheet(), media_type="text/css")

    @routes.get("/images/{name}")
    def picture(name: str) -> Response:
        return FileResponse(found(listed(folder_of("images"), PICTURES), name, "picture"))

    @routes.get("/source/{name:path}")
    def source(name: str) -> Response:
        changed = found(sources(), name, "source file").stat().st_mtime_ns
        return HTMLResponse(source_html(name, changed))

    @routes.get("/{language}")
    @routes.get("/{language}/")
    def language_index(language: str, request: Request) -> Response:
        if language not in LANGUAGES:
            raise ApiError(404, f"The documentation is in {' and '.join(LANGUAGES)}.")
        return RedirectResponse("index" if request.url.path.endswith("/") else f"{language}/index")

    @routes.get("/{language}/{page}")
    def page(language: str, page: str) -> Response:
        if language not in LANGUAGES:
            raise ApiError(404, f"The documentation is in {' and '.join(LANGUAGES)}.")
        pages = listed(folder_of(language), [".md"])
        path = found(pages, f"{page.removesuffix('.md')}.md", "page")
        return HTMLResponse(page_html(path, language, path.stat().st_mtime_ns))

    return routes
