"""The server of the live page, on this machine alone unless another address is asked for."""

import errno
import logging
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING

from saelens_ext.serve.live import LiveModel

if TYPE_CHECKING:
    import uvicorn

LOOPBACK = "127.0.0.1"
PORT = 7860

logger = logging.getLogger(__name__)


def listen(host: str = LOOPBACK, port: int = PORT) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        ValueError: a port that is none, or in use; an address that is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be 0 (any that is free) to 65535, got {port}.")
    try:
        address = ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise ValueError(f"host must be an address of this machine, such as {LOOPBACK}, got {host!r}.") from error
    found = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((str(address), port))
        found.listen()
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            remedy = f"give another, --port={port + 1 if port < 65535 else port - 1}, or --port=0 for any that is free"
            raise ValueError(f"Port {port} of {host} is in use: {remedy}.") from error
        raise ValueError(f"Port {port} of {host} cannot be opened: {error.strerror}.") from error
    if not address.is_loopback:
        logger.warning(
            "Whoever reaches %s can read with this model, without a password; %s keeps it to this machine.",
            host,
            LOOPBACK,
        )
    return found


def address_of(listening: socket.socket) -> str:
    """The page's address."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def make_server(live: LiveModel, listening: socket.socket, title: str | None = None) -> "uvicorn.Server":
    """The server, to be run with ``server.run(sockets=[listening])``.

    Raises:
        ImportError: the packages of the extra ``serve`` are not installed.
    """
    check_installed()
    import uvicorn

    from saelens_ext.serve.page import LivePage

    local = ip_address(listening.getsockname()[0]).is_loopback
    page = LivePage(live, title)
    config = uvicorn.Config(
        page.app([LOOPBACK, "localhost", "::1", "[::1]"] if local else ["*"]),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def check_installed() -> None:
    """ImportError, with the remedy, unless the packages of the extra ``serve`` are installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"The live page needs the package {error.name}: pip install 'saelens-ext[serve]'") from error
