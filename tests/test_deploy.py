"""Dockerfile, systemd unit and the page about them: their command lines are those that exist."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llm_from_scratch.cli import chat, serve
from llm_from_scratch.cli.serve import KEYS
from llm_from_scratch.core.config import Parser

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
UNIT = (ROOT / "deploy" / "scratchlm.service").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "en" / "deploy.md").read_text(encoding="utf-8")


def parse(command: str) -> argparse.Namespace:
    """`scratchlm VERB ...` as the command itself reads it."""
    words = shlex.split(command)
    assert Path(words[0]).name == "scratchlm"
    parser = Parser(prog="scratchlm")
    parts = parser.add_subparsers(parser_class=Parser)
    for verb in (serve, chat):
        verb.add_parser(parts)
    found: argparse.Namespace = parser.parse_args(words[1:])
    return found


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, its text) of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in text.split("\n") if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.split("\n") if line.strip()]  # type: ignore[misc]


def settings_of(unit: str) -> dict[str, list[str]]:
    """KEY=VALUE lines of a unit, each key with all its values."""
    found: dict[str, list[str]] = {}
    for line in unit.split("\n"):
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def of_kind(kind: str) -> list[str]:
    return [text for name, text in instructions(DOCKERFILE) if name == kind]


ENV = dict(pair.split("=", 1) for pair in " ".join(of_kind("ENV")).split())


def expanded(text: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda name: variables[name[1]], text)


# ------------------------------------------------------------------------- Dockerfile


def test_the_container_starts_the_server() -> None:
    (words,) = of_kind("CMD")
    shell, option, script = json.loads(words)
    assert (shell, option) == ("sh", "-c")
    assert script.startswith("exec ")  # or signals would reach the shell alone
    args = parse(expanded(script.removeprefix("exec "), ENV))
    assert args.models == ["smollm2-135m"]
    assert args.host == "0.0.0.0"
    assert [str(args.port)] == of_kind("EXPOSE") == [ENV["PORT"]] == ["7860"]
    assert KEYS in DOCKERFILE and KEYS not in ENV  # a person's to set, never the image's


def test_the_container_is_nobody_special() -> None:
    assert of_kind("USER") == ["1000"]
    order = [name for name, _ in instructions(DOCKERFILE)]
    assert order.index("USER") < order.index("CMD")
    assert of_kind("VOLUME") == [ENV["SCRATCHLM_CACHE"]] == ["/models"]
    assert any("--owner=user /models" in text for text in of_kind("RUN"))


def test_the_health_check_asks_what_the_server_answers() -> None:
    from llm_from_scratch.serve.guard import OPEN

    (check,) = of_kind("HEALTHCHECK")
    code = json.loads(check.partition("CMD ")[2])[2]
    compile(code, "HEALTHCHECK", "exec")
    path = re.search(r"\]\}(/\w+)'", code)
    assert path and path[1] in OPEN


def test_the_image_has_the_tested_versions() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    tested = re.search(r"Python (3\.\d+); Linux", constraints)
    assert tested
    images = [text.split()[0] for text in of_kind("FROM")]
    assert len(images) == 2
    assert all(image.startswith(f"python:{tested[1]}-slim") for image in images)
    installs = [text for text in of_kind("RUN") if "pip install" in text]
    assert installs
    for text in installs:
        assert "--constraint /tmp/constraints.txt" in text or "--no-deps" in text
        assert "==" not in text  # versions stand in one place
    assert "PIP_CONSTRAINT=/src/constraints.txt" in DOCKERFILE
    pins = set(re.findall(r"^([\w.-]+)==", constraints.lower().replace("_", "-"), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    used = re.findall(r"extras\['(\w+)'\]", DOCKERFILE)
    assert "serve" in used
    wanted = [*project["dependencies"], *(one for extra in used for one in extras[extra])]
    for requirement in wanted:
        name = re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
        assert name in pins, f"constraints.txt does not pin {name}"


def test_all_that_is_copied_is_there_and_nothing_else_is_sent() -> None:
    sent = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
        if line.startswith("!")
    }
    copied = {name for text in of_kind("COPY") for name in text.split()[:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    assert "*" in (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")


# ------------------------------------------------------------------------- systemd


def test_the_unit_starts_the_server_and_lets_it_end() -> None:
    unit = settings_of(UNIT)
    (line,) = unit["ExecStart"]
    args = parse(line)
    assert args.host == "127.0.0.1"
    assert args.api_keys == "${CREDENTIALS_DIRECTORY}/api_keys"
    assert unit["LoadCredential"] == ["api_keys:/etc/scratchlm/api_keys"]
    assert KEYS not in UNIT
    assert int(unit["TimeoutStopSec"][0]) > args.grace + 10
    (environment,) = unit["Environment"]
    folder = "/var/cache/" + unit["CacheDirectory"][0]
    assert f"SCRATCHLM_CACHE={folder}" in environment.split()
    for key, value in (("DynamicUser", "yes"), ("ProtectSystem", "strict"), ("UMask", "0077")):
        assert unit[key] == [value]


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    unit = tmp_path / "scratchlm.service"
    unit.write_text(UNIT.replace("/opt/scratchlm/bin/scratchlm", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# ------------------------------------------------------------------------- the page


def test_every_command_of_the_page_is_one() -> None:
    lines = re.sub(r"\\\n\s*", "", PAGE).split("\n")
    commands = [
        line[match.start("command") :]
        for line in lines
        if (match := re.search(r"(?:^|\s|=|/bin/)(?P<command>scratchlm serve )", line))
        and not line.startswith(("-", "|", "`"))
    ]
    assert len(commands) >= 3
    for command in commands:
        assert parse(command).models


def test_the_page_names_what_the_files_say() -> None:
    for name in ("MODELS", "PORT"):
        assert f"| `{name}` |" in PAGE
        assert f"| `{ENV[name]}` |" in PAGE
    assert f"| `{KEYS}` |" in PAGE
    assert f"app_port: {ENV['PORT']}" in PAGE
    limits = parse("scratchlm serve x")
    proxy = re.search(r"proxy_read_timeout (\d+)s", PAGE)
    body = re.search(r"client_max_body_size (\d+)m;", PAGE)
    assert proxy and int(proxy[1]) > limits.max_seconds
    assert body and int(body[1]) << 20 == limits.max_body
