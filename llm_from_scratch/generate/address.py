"""The address of a server and the key for it, checked before anything is sent."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

import httpx2

from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.generate.chat import KEY_VARIABLE


def checked_address(base_url: str) -> tuple[str, str]:
    """The address without what does not belong to it, and its host."""
    remedy = "give one such as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
        httpx2.URL(base_url)
    except (ValueError, httpx2.InvalidURL):  # whose words may hold what nobody should see
        raise UserError(f"The address of the server cannot be read; {remedy}.") from None
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"The address has a name or password in it; give the key as {KEY_VARIABLE} instead."
        )
    if parts.query or parts.fragment:
        raise UserError(
            "The address has a part behind ? or #; leave that out, and give a key as "
            f"{KEY_VARIABLE}."
        )
    readable = base_url.isprintable() and " " not in base_url
    known = parts.scheme in ("http", "https")
    if not host or not known or not readable:
        raise UserError(f"{shown(base_url)} is no address of a server; {remedy}.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}", host


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def checked_key(api_key: str | None) -> str:
    """The key that is sent, "" for none. No message ever shows it."""
    key = (os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key).strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            "The key has characters that no key has (a space, a line end, a letter beyond ASCII); "
            "copy it anew."
        )
    return key
