"""Which addresses a webhook may be sent to: those of the public Internet, and networks that the operator names.

A caller chooses the URL, we send from inside: without this, one could make us knock at the cloud's metadata service or
at a database beside us (server-side request forgery). A name is resolved once, every address it leads to is judged, and
the connection goes to what was judged: a name that answers differently the next time gains nothing.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from aiohttp.abc import AbstractResolver, ResolveResult

from agentq.errors import ConfigError
from agentq.notify.failure import NotDelivered

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[[str], Awaitable[Sequence[str]]]

# Never, whatever the operator allows: link-local (the metadata services of most clouds) and Azure's, which is public.
_NEVER = tuple(ip_network(one) for one in ("169.254.0.0/16", "fe80::/10", "168.63.129.16/32", "fd00:ec2::254/128"))
# What Python 3.11 calls global and is not an ordinary host: 6to4's relays and the protocol assignments (RFC 6890).
_SPECIAL = tuple(ip_network(one) for one in ("192.0.0.0/24", "192.88.99.0/24", "2002::/16", "3fff::/20"))
_UNICAST = IPv6Network("2000::/3")  # all that is handed out of IPv6's global unicast
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last 32 bits


class Guard:
    """Judges addresses. ``allowed``: networks besides the public Internet, for instance of the caller's own servers."""

    def __init__(self, allowed: Sequence[Network] = ()) -> None:
        self._allowed = tuple(allowed)

    def refusal(self, text: str, *, secure: bool = True) -> str | None:
        """Why nothing may be sent to this address, None if it may. ``secure``: over TLS; without, only this machine."""
        try:
            address = _plain(ip_address(text))
        except ValueError:
            return "is no address"
        if any(address in network for network in _NEVER):
            return "is of a kind that is never called"
        if not secure and not address.is_loopback:
            return "is not this machine, and http:// is for this machine only"
        if any(address in network for network in self._allowed) or _is_public(address):
            return None
        return "is not of the public Internet"

    def check(self, host: str, addresses: Sequence[str], *, secure: bool = True) -> None:
        """Raises ``NotDelivered`` unless every address that ``host`` leads to may be called."""
        for address in addresses:
            if why := self.refusal(address, secure=secure):
                raise NotDelivered(f"{host} leads to an address that {why}.", code="address_refused", final=True)


def _plain(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_public(address: Address) -> bool:
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, IPv6Address) and address not in _UNICAST:
        return False
    return not any(address in network for network in _SPECIAL)


def parse_networks(text: str) -> list[Network]:
    """``10.0.0.0/8, ::1``: networks or addresses, separated by commas. Raises ``ConfigError``."""
    try:
        return [ip_network(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"webhook_networks: {error}.", hint="Write e.g. 10.0.0.0/8,192.168.7.1") from None


# As many as there are tries at once (``agentq.notify.notifier``): a tenant's slow name server delays nobody else's.
_THREADS = ThreadPoolExecutor(64, "names")


async def look_up(host: str) -> list[str]:
    """The addresses of a name, or the address that it is already. Raises ``OSError``."""
    look_up = partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_THREADS, look_up)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class Pinned(AbstractResolver):
    """Gives aiohttp the addresses that were judged, whatever name it asks for."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002
    ) -> list[ResolveResult]:
        return [_found(host, address, port) for address in self._addresses]

    async def close(self) -> None:
        """Nothing to close."""


def _found(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return {
        "hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": socket.AI_NUMERICHOST,
    }  # fmt: skip
