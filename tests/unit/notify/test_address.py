"""Which addresses a webhook may go to."""

from __future__ import annotations

import pytest

from agentq.errors import ConfigError
from agentq.notify.address import Guard, look_up, parse_networks
from agentq.notify.failure import NotDelivered

PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8", "64:ff9b::808:808"]

NOT_PUBLIC = {
    "this machine": "127.0.0.1",
    "all of this machine": "127.255.255.254",
    "this machine, IPv6": "::1",
    "this machine as IPv4 in IPv6": "::ffff:127.0.0.1",
    "this machine as IPv4 in IPv6, compatible": "::7f00:1",
    "this machine behind NAT64": "64:ff9b::7f00:1",
    "this machine behind 6to4": "2002:7f00:1::",
    "no address": "0.0.0.0",
    "no address, IPv6": "::",
    "private 10": "10.1.2.3",
    "private 172": "172.16.0.1",
    "private 192": "192.168.1.1",
    "private as IPv4 in IPv6": "::ffff:10.0.0.1",
    "carrier NAT, Alibaba's metadata": "100.100.100.200",
    "metadata": "169.254.169.254",
    "metadata as IPv4 in IPv6": "::ffff:169.254.169.254",
    "metadata behind NAT64": "64:ff9b::a9fe:a9fe",
    "metadata of AWS, IPv6": "fd00:ec2::254",
    "metadata of Azure, a public address": "168.63.129.16",
    "metadata of Oracle": "192.0.0.192",
    "link-local, IPv6": "fe80::1",
    "link-local with its zone": "fe80::1%eth0",
    "unique local": "fd12:3456::1",
    "site-local": "fec0::1",
    "multicast": "224.0.0.1",
    "multicast, IPv6": "ff02::1",
    "broadcast": "255.255.255.255",
    "reserved": "240.0.0.1",
    "benchmarks": "198.18.0.1",
    "documentation": "203.0.113.7",
    "documentation, IPv6": "2001:db8::1",
    "documentation, IPv6, newer": "3fff::1",
    "6to4's relays": "192.88.99.1",
    "Teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "local NAT64": "64:ff9b:1::1",
    "segment routing": "5f00::1",
    "a name": "localhost",
    "IPv4 in a short form": "127.1",
    "nothing": "",
}


@pytest.mark.parametrize("address", PUBLIC)
def test_an_address_of_the_public_internet_may_be_called(address: str) -> None:
    assert Guard().refusal(address) is None


@pytest.mark.parametrize("address", NOT_PUBLIC.values(), ids=NOT_PUBLIC.keys())
def test_every_other_address_is_refused(address: str) -> None:
    assert Guard().refusal(address) is not None


def test_a_network_that_the_operator_names_may_be_called_and_its_neighbours_may_not() -> None:
    guard = Guard(parse_networks("10.0.0.0/8, ::1"))
    assert guard.refusal("10.9.8.7") is None
    assert guard.refusal("::ffff:10.9.8.7") is None
    assert guard.refusal("::1") is None
    assert guard.refusal("127.0.0.1") is not None
    assert guard.refusal("192.168.1.1") is not None


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1", "168.63.129.16", "::ffff:169.254.169.254"])
def test_metadata_services_are_refused_whatever_the_operator_names(address: str) -> None:
    assert Guard(parse_networks("0.0.0.0/0,::/0")).refusal(address) is not None


def test_without_tls_only_this_machine_may_be_called_and_only_if_named() -> None:
    guard = Guard(parse_networks("127.0.0.0/8,10.0.0.0/8"))
    assert guard.refusal("127.0.0.1", secure=False) is None
    assert guard.refusal("10.0.0.1", secure=False) is not None
    assert guard.refusal("8.8.8.8", secure=False) is not None
    assert Guard().refusal("127.0.0.1", secure=False) is not None


def test_one_bad_address_among_good_ones_is_enough_to_refuse_a_name() -> None:
    with pytest.raises(NotDelivered) as refused:
        Guard().check("hooks.example", ["8.8.8.8", "10.0.0.1"])
    assert refused.value.code == "address_refused"
    assert refused.value.final
    assert "10.0.0.1" not in str(refused.value), "what a name leads to inside is not for its owner to read"


def test_networks_that_are_none_are_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="webhook_networks"):
        parse_networks("10.0.0.0/8, intranet")
    assert parse_networks("") == []


async def test_a_name_is_looked_up_and_an_address_is_itself() -> None:
    assert "127.0.0.1" in await look_up("localhost")
    assert await look_up("10.0.0.1") == ["10.0.0.1"]
