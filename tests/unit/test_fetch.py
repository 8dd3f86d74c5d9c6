"""Where an image's address may lead; against real servers on this machine."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qvq_serve.hooks.fetch import FetchError, PublicResolver, fetch, is_public

LOCAL = frozenset({"127.0.0.1"})


class Pages(BaseHTTPRequestHandler):
    """/bytes/N, /status/N, and /to/ADDRESS, which redirects."""

    seen: tuple[str, ...] = ()

    def do_GET(self) -> None:
        Pages.seen += (self.path,)
        kind, _, rest = self.path[1:].partition("/")
        body = b"x" * int(rest) if kind == "bytes" else b""
        self.send_response({"to": 302, "status": int(rest) if kind == "status" else 0}.get(kind, 200))
        if kind == "to":
            self.send_header("Location", self.path if rest == "self" else rest)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as pages:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{pages.server_address[1]}"
        pages.shutdown()


def got(url: str, allowed: frozenset[str] = LOCAL, most_bytes: int = 1000) -> bytes:
    return asyncio.run(fetch(url, allowed=allowed, most_bytes=most_bytes))


def why_not(url: str, allowed: frozenset[str] = LOCAL, most_bytes: int = 1000) -> str:
    with pytest.raises(FetchError) as error:
        got(url, allowed, most_bytes)
    return str(error.value)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
     "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
     "2002:7f00:1::", "ff02::1", "198.18.0.1", "192.0.2.1", "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b:1::7f00:1",
     "fec0::1"],
)  # fmt: skip
def test_addresses_that_are_not_the_internets_are_known_in_every_spelling(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0",
        "①②⑦.⓪.⓪.①",
        "１２７.0.0.1",
        "127。0。0。1",
        "127.0.0.1.",
    ],
)
def test_no_spelling_of_this_machine_is_fetched(web: str, host: str) -> None:
    port = web.rsplit(":", 1)[1]
    before = len(Pages.seen)
    reason = why_not(f"http://{host}:{port}/bytes/3", frozenset())
    assert "is not on the public internet" in reason or "has no valid address" in reason
    assert len(Pages.seen) == before


def test_a_name_that_resolves_to_a_private_address_is_refused() -> None:
    async def resolved(*allowed: str) -> list[Any]:
        return await PublicResolver(allowed).resolve("localhost", 80)

    with pytest.raises(FetchError):
        asyncio.run(resolved())
    assert asyncio.run(resolved("localhost"))


def test_a_host_that_the_operator_names_is_read_and_no_other(web: str) -> None:
    assert got(f"{web}/bytes/3") == b"xxx"
    assert why_not("http://localhost/x") == "is on localhost; this server reads from 127.0.0.1"


def test_a_redirect_is_checked_like_the_address_itself(web: str) -> None:
    assert got(f"{web}/to/{web}/bytes/5") == b"xxxxx"
    port = web.rsplit(":", 1)[1]
    assert "is on localhost" in why_not(f"{web}/to/http://localhost:{port}/bytes/5")
    assert "has the scheme 'file'" in why_not(f"{web}/to/file:///etc/passwd")
    assert "more than 5 redirects" in why_not(f"{web}/to/self")


def test_size_status_scheme_and_user_names_are_refused_clearly(web: str) -> None:
    assert why_not(f"{web}/bytes/1001") == "has more than 1000 bytes"
    assert got(f"{web}/bytes/1000") == b"x" * 1000
    assert why_not(f"{web}/status/404") == "cannot be fetched: HTTP 404"
    assert why_not("gopher://127.0.0.1/") == "has the scheme 'gopher'; https:, http: and data: are read"
    assert "user name" in why_not("http://me:secret@127.0.0.1/")
    assert "no valid address" in why_not("http://[::1/")
    assert "cannot be fetched: " in why_not("http://127.0.0.1:9/")
