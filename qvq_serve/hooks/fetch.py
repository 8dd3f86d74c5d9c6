"""Where an image's address may lead: the internet's public addresses, or the hosts that the operator names.

A name is resolved once, here, and the connection goes to the addresses that were checked; so does each redirect.
"""

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

MOST_REDIRECTS = 5
CHUNK_BYTES = 1 << 16
NAT64 = ipaddress.ip_network("64:ff9b::/96")
OLD_FORMS = [ipaddress.ip_network(name) for name in ("::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48")]
"""Of IPv4 addresses in IPv6, which Python takes for the internet's: compatible, translated, local NAT64."""


class FetchError(ValueError):
    """An image that is not fetched, with the reason for the client."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's: not private, loopback, link-local, multicast or reserved, nor one
    of IPv6's ways to write such an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local or any(ip in network for network in OLD_FORMS):
            return False
    return ip.is_global and not ip.is_multicast


class PublicResolver(AbstractResolver):
    """The system's resolver, for public addresses and the hosts that are allowed by name."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self.allowed = frozenset(allowed)
        self.system = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self.system.resolve(host, port, family)
        if host in self.allowed or all(is_public(result["host"]) for result in found):
            return found
        raise FetchError(f"leads to {host}, which is not on the public internet")

    async def close(self) -> None:
        await self.system.close()


def checked(url: str, allowed: frozenset[str]) -> URL:
    """The address as aiohttp reads it, to which digits of any script are digits.

    Raises FetchError for a scheme, a host or a literal address that is not to be reached.
    """
    try:
        address = URL(url)
        host = address.raw_host or ""
    except ValueError as error:
        raise FetchError(f"has no valid address: {error}") from None
    if address.scheme not in ("http", "https") or not host:
        raise FetchError(f"has the scheme '{address.scheme}'; https:, http: and data: are read")
    if address.user is not None:
        raise FetchError("has a user name in its address, which is not sent")
    if allowed and host not in allowed:
        raise FetchError(f"is on {host}; this server reads from {', '.join(sorted(allowed))}")
    try:
        public = is_public(host)
    except ValueError:
        return address  # a name: the resolver looks at its addresses
    if not public and host not in allowed:
        raise FetchError(f"leads to {host}, which is not on the public internet")
    return address


async def fetch(url: str, *, allowed: frozenset[str], most_bytes: int) -> bytes:
    """The body at an address, through at most 5 redirects. Raises FetchError; the caller sets the time limit.

    `allowed` are the hosts to read from, whatever their addresses; empty for all public ones.
    """
    options: dict[str, Any] = {"resolver": PublicResolver(allowed), "force_close": True, "use_dns_cache": False}
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(**options), trust_env=False) as session:
            for _ in range(MOST_REDIRECTS + 1):
                async with session.get(checked(url, allowed), allow_redirects=False) as answer:
                    if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                        url = urljoin(url, answer.headers["Location"])
                        continue
                    if answer.status != 200:
                        raise FetchError(f"cannot be fetched: HTTP {answer.status}")
                    body = bytearray()
                    async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
                        body += chunk
                        if len(body) > most_bytes:
                            raise FetchError(f"has more than {most_bytes} bytes")
                    return bytes(body)
    except aiohttp.InvalidURL:
        raise FetchError("has no valid address") from None
    except aiohttp.ClientError as error:
        cause = error.__cause__ or error
        if isinstance(cause, FetchError):
            raise cause from None
        reason = cause.strerror if isinstance(cause, OSError) else None
        raise FetchError(f"cannot be fetched: {reason or type(error).__name__}") from None
    raise FetchError(f"leads on through more than {MOST_REDIRECTS} redirects")
