"""Running the server: a socket, the loop, and an end that finishes what was begun."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.serve.app import make_app
from llm_from_scratch.serve.service import Service

GRACE = 30.0  # seconds for what runs when the server is asked to end
FLUSH = 5  # seconds for clients to read the last of their answers


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet; a `UserError` where that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"--host is '{host}', which is no address of this machine.") from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise _sentence(error, host, port) from error
    return bound


def _sentence(error: Exception, host: str, port: int) -> UserError:
    number = getattr(error, "errno", None)
    if number in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", None)):
        return UserError(f"Port {port} is in use already; choose another with --port (0: any).")
    if number in (errno.EACCES, errno.EPERM):
        return UserError(f"Port {port} may not be opened by you; choose one above 1023.")
    if number == errno.EADDRNOTAVAIL:
        return UserError(f"--host is '{host}', which is no address of this machine.")
    return UserError(f"{host} port {port} cannot be opened: {error}.")


def listen(bound: socket.socket) -> None:
    """Let clients come; a `UserError` if another program was faster."""
    try:
        bound.listen(2048)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _sentence(error, host, port) from error


def address_of(bound: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, which on a signal finishes what runs, and on a second one ends at once."""

    def __init__(
        self, service: Service, grace: float = GRACE, started: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="on",
                ws="none",
                timeout_graceful_shutdown=FLUSH,
            )
        )
        self.service = service
        self.grace = grace
        self.on_started = started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._until: float | None = None
        self._cut = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would leave the application standing
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.ask_to_end()

    def ask_to_end(self) -> None:
        """Take nothing new and end when all is done; asked again, end at once."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._hang_up)
        self.service.draining = True

    def _hang_up(self) -> None:
        """Close all connections; what is done for them stops, as for clients that leave."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and not self.should_exit:
            now = time.monotonic()
            if self._until is None:
                self._until = now + self.grace
            if self.service.in_flight == 0 or now > self._until + FLUSH:
                self.should_exit = True
            elif now > self._until and not self._cut:
                self._cut = True
                self.service.worker.end_all()
        return await super().on_tick(counter)


def serve(
    service: Service,
    bound: socket.socket,
    grace: float = GRACE,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Answer requests until a signal comes, SIGINT (Ctrl-C) or SIGTERM."""
    listen(bound)
    server = Server(service, grace, started)
    asyncio.run(server.serve(sockets=[bound]))
    if not service.worker.stop(0.0):
        # A thread in the middle of a long step would crash an interpreter that ends around it.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def set_up_logs() -> None:
    """Requests and errors go to standard error, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("scratchlm", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger("scratchlm").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
