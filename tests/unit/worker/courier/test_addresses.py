"""Which addresses a webhook may reach."""

from __future__ import annotations

import ipaddress
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.courier.addresses import AddressPolicy, AddressRefused, ResolutionFailed, canonical

PUBLIC = ["93.184.215.14", "1.1.1.1", "8.8.8.8", "172.32.0.1", "192.0.1.1", "100.128.0.1", "2606:4700::1111", "2a00::1"]
PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "10.1.2.3",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "::1",
    "fc00::1",
    "fdff::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
]
NEVER = [
    "0.0.0.0",
    "0.1.2.3",
    "100.64.0.1",
    "100.127.255.255",
    "100.100.100.200",
    "168.63.129.16",
    "161.26.0.8",
    "166.8.0.1",
    "169.254.169.254",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::7f00:1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::5db8:d70e",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:a9fe:a9fe::",
    "2002:7f00:1::1",
    "3fff::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fd00:42::42",
    "fd00:a9fe:a9fe::1",
    "fe80::1",
    "fe80::1%eth0",
    "febf::1",
    "fec0::1",
    "ff02::1",
    "4000::1",
    "5f00::1",
]


def _policy(*answer: str, allow_private: bool = False) -> AddressPolicy:
    return AddressPolicy(allow_private, resolver=lambda host, port: list(answer))


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_is_allowed(address: str) -> None:
    assert _policy(address).addresses("a.example", 443, timeout=60) == [address]


@pytest.mark.parametrize("address", PRIVATE + NEVER)
def test_non_public_address_is_refused(address: str) -> None:
    with pytest.raises(AddressRefused, match=r"may not reach a\.example \(.*\): .* address"):
        _policy(address).addresses("a.example", 443, timeout=60)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_network_is_allowed_when_configured(address: str) -> None:
    assert _policy(address, allow_private=True).addresses("a.example", 80, timeout=60) == [str(canonical(address))]


@pytest.mark.parametrize("address", NEVER)
def test_other_networks_are_refused_when_the_private_one_is_allowed(address: str) -> None:
    with pytest.raises(AddressRefused):
        _policy(address, allow_private=True).addresses("a.example", 80, timeout=60)


def test_name_is_refused_when_one_of_its_addresses_is_forbidden() -> None:
    with pytest.raises(AddressRefused, match=r"10\.0\.0\.1"):
        _policy("93.184.215.14", "2606:4700::1111", "10.0.0.1").addresses("a.example", 443, timeout=60)


def test_addresses_are_returned_in_order() -> None:
    answer = ["2606:4700::1111", "93.184.215.14"]
    assert _policy(*answer).addresses("a.example", 443, timeout=60) == answer


def test_mapped_ipv6_address_connects_as_ipv4() -> None:
    assert _policy("::ffff:93.184.215.14").addresses("a.example", 443, timeout=60) == ["93.184.215.14"]


def test_resolution_fails_when_it_takes_too_long() -> None:
    release = threading.Event()

    def silent(host: str, port: int) -> list[str]:
        release.wait(10)  # an end that a look-up without a limit would wait for
        return ["93.184.215.14"]

    with pytest.raises(ResolutionFailed, match="no answer"):
        AddressPolicy(resolver=silent).addresses("a.example", 443, timeout=0.05)
    release.set()


def test_resolution_fails_when_the_answer_is_empty() -> None:
    with pytest.raises(ResolutionFailed, match="has no address"):
        _policy().addresses("a.example", 443, timeout=60)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 300])
def test_resolution_fails_when_the_name_is_unknown(host: str) -> None:
    with pytest.raises(ResolutionFailed):
        AddressPolicy().addresses(host, 80, timeout=60)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "0177.0.0.1", "::1"])
def test_every_spelling_of_loopback_is_seen_through(host: str) -> None:
    with pytest.raises(AddressRefused, match="loopback"):
        AddressPolicy().addresses(host, 80, timeout=60)


@given(st.ip_addresses(v=6))
def test_ipv6_address_is_refused_when_python_calls_it_private(address: ipaddress.IPv6Address) -> None:
    refused = AddressPolicy().refusal(canonical(str(address))) is not None
    assert refused or address.is_global


@given(st.ip_addresses(v=4))
def test_ipv4_address_is_refused_when_python_calls_it_private(address: ipaddress.IPv4Address) -> None:
    refused = AddressPolicy().refusal(address) is not None
    assert refused or address.is_global
    # The same address inside IPv6, in each of the ways that carry it.
    number = int(address)
    mapped = ipaddress.IPv6Address((0xFFFF << 32) | number)
    nat64 = ipaddress.IPv6Address((0x64FF9B << 96) | number)
    six_to_four = ipaddress.IPv6Address((0x2002 << 112) | (number << 80))
    assert (AddressPolicy().refusal(canonical(str(mapped))) is not None) == refused
    for wrapped in (nat64, six_to_four):
        assert AddressPolicy(allow_private=True).refusal(canonical(str(wrapped))) is not None
