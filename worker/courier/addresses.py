"""Which addresses a webhook may reach. A tenant names the URL, so the courier must not be a way into the inside (SSRF).

A host is resolved once; one address that is not allowed refuses them all, since a name that answers with a public and
an inside address is an attack, and the connection then goes to exactly the addresses that were checked.

Sources: the IANA special-purpose address registries (RFC 6890 and successors). `ipaddress.is_global` is not enough: it
calls NAT64 (64:ff9b::a9fe:a9fe) and 6to4 (2002:a9fe:a9fe::) global, and both embed 169.254.169.254.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], list[str]]

# Refused unless the operator opens private networks to webhooks.
_PRIVATE = {
    "127.0.0.0/8": "loopback",
    "::1/128": "loopback",
    "10.0.0.0/8": "private",
    "172.16.0.0/12": "private",
    "192.168.0.0/16": "private",
    "fc00::/7": "unique local",
}
# Refused always. First match wins.
_NEVER = {
    "fd00:ec2::/32": "cloud metadata",  # of AWS, inside fc00::/7 as are the next three
    "fd20:ce::/32": "cloud metadata",  # Google
    "fd00:42::/32": "cloud metadata",  # Scaleway
    "fd00:a9fe:a9fe::/48": "cloud metadata",  # Akamai
    "168.63.129.16/32": "cloud metadata",  # Azure's wire server: a public address that only its own machines reach
    "161.26.0.0/16": "cloud services",  # IBM's, likewise
    "166.8.0.0/14": "cloud services",
    "0.0.0.0/8": "this network",
    "100.64.0.0/10": "carrier-grade NAT",  # a cloud's metadata service lives here too
    "169.254.0.0/16": "link-local",
    "192.0.0.0/24": "protocol assignments",
    "192.0.2.0/24": "documentation",
    "192.88.99.0/24": "6to4 relay",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",  # class E and broadcast
    "64:ff9b::/96": "NAT64",
    "64:ff9b:1::/48": "NAT64",
    "100::/64": "discard",
    "2001::/23": "protocol assignments",  # Teredo, ORCHID, benchmarking
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "3fff::/20": "documentation",
    "fe80::/10": "link-local",
    "fec0::/10": "site-local",
    "ff00::/8": "multicast",
}
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # nothing else of IPv6 is handed out


class AddressRefused(Exception):
    """The host has an address that a webhook may not reach. The message names both."""


class ResolutionFailed(Exception):
    """The host has no address, or its name servers did not answer in time."""


def resolve_with_system(host: str, port: int) -> list[str]:
    """The system's answer, each address once, in its order. May block for as long as the resolver is set to wait."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in answers))


@dataclass(frozen=True)
class AddressPolicy:
    """`allow_private` opens loopback and private networks; link-local and the like stay closed."""

    allow_private: bool = False
    resolver: Resolver = field(default=resolve_with_system)

    def addresses(self, host: str, port: int, *, timeout: float) -> list[str]:
        """Every address of `host`, all of them allowed. Raises `AddressRefused`, or `ResolutionFailed`."""
        answer = self._resolve(host, port, timeout)
        if not answer:
            raise ResolutionFailed(f"{host} has no address")
        checked = []
        for text in answer:
            address = canonical(text)
            kind = self.refusal(address)
            if kind is not None:
                named = text if text == host else f"{host} ({text})"
                raise AddressRefused(f"webhooks may not reach {named}: {kind} address")
            checked.append(str(address))
        return checked

    def refusal(self, address: Address) -> str | None:
        """The kind of range that makes an address forbidden, or None where it is allowed."""
        for network, kind in _NEVER_NETWORKS:
            if address.version == network.version and address in network:
                return kind
        for network, kind in _PRIVATE_NETWORKS:
            if address.version == network.version and address in network:
                return None if self.allow_private else kind
        return None if isinstance(address, ipaddress.IPv4Address) or address in _GLOBAL_UNICAST else "reserved"

    def _resolve(self, host: str, port: int, timeout: float) -> list[str]:
        # getaddrinfo cannot be interrupted: it runs beside, and is left to itself where it takes too long.
        outcome: list[list[str] | OSError | UnicodeError] = []

        def look_up() -> None:
            try:
                outcome.append(self.resolver(host, port))
            except (OSError, UnicodeError) as error:
                outcome.append(error)

        thread = threading.Thread(target=look_up, name=f"resolve {host}", daemon=True)
        thread.start()
        thread.join(timeout)
        if not outcome:
            raise ResolutionFailed(f"no answer from the name servers for {host}")
        answer = outcome[0]
        if isinstance(answer, Exception):
            raise ResolutionFailed(f"cannot resolve {host}: {answer}") from answer
        return answer


def canonical(text: str) -> Address:
    """An address as the network will treat it: IPv4 inside IPv6 (::ffff:127.0.0.1) is that IPv4 address."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


_NEVER_NETWORKS = [(ipaddress.ip_network(network), kind) for network, kind in _NEVER.items()]
_PRIVATE_NETWORKS = [(ipaddress.ip_network(network), kind) for network, kind in _PRIVATE.items()]
