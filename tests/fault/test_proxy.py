"""The fault proxy does what its methods say, on a server that echoes."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.fault.proxy import Proxy


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        try:
            while data := self.request.recv(65_536):
                self.request.sendall(data)
        except OSError:
            pass  # the proxy reset the connection


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with Proxy(server.server_address[1]) as proxy:
            yield proxy
        server.shutdown()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def echo(peer: socket.socket, data: bytes = b"hello") -> bytes:
    got = b""
    for start in range(0, len(data), 10_000):
        peer.sendall(data[start : start + 10_000])
        while len(got) < min(start + 10_000, len(data)):
            got += peer.recv(10_000)
    return got


def answers(peer: socket.socket) -> bool:
    peer.settimeout(0.3)
    try:
        return bool(peer.recv(1))
    except TimeoutError:
        return False


def test_without_faults_bytes_come_back_as_they_were(proxy: Proxy) -> None:
    with connect(proxy) as peer:
        assert echo(peer, bytes(range(256)) * 4096) == bytes(range(256)) * 4096


def test_latency_is_added_in_each_direction_and_taken_off_again(proxy: Proxy) -> None:
    with connect(proxy) as peer:
        proxy.latency(0.1)
        began = time.monotonic()
        assert echo(peer) == b"hello"
        assert time.monotonic() - began >= 0.2
        proxy.heal()
        assert echo(peer) == b"hello"


def test_a_reset_ends_what_is_there_and_new_connections_work(proxy: Proxy) -> None:
    with connect(proxy) as peer:
        assert echo(peer) == b"hello"
        assert proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
    with connect(proxy) as peer:
        assert echo(peer) == b"hello"


def test_a_refusing_proxy_resets_every_new_connection_until_it_is_healed(proxy: Proxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionResetError), connect(proxy) as peer:
        peer.recv(1)
    proxy.heal()
    with connect(proxy) as peer:
        assert echo(peer) == b"hello"


def test_a_black_hole_answers_nobody_and_then_delivers_what_it_held(proxy: Proxy) -> None:
    with connect(proxy) as old:
        assert echo(old) == b"hello"
        proxy.black_hole()
        with connect(proxy) as new:  # accepted, as by a host that is there and silent
            for peer in (old, new):
                peer.sendall(b"x")
                assert not answers(peer)
            proxy.heal()
            assert answers(old)
            assert answers(new)


def test_a_half_open_connection_swallows_and_never_tells(proxy: Proxy) -> None:
    with connect(proxy) as old:
        assert echo(old) == b"hello"
        assert proxy.half_open() == 1
        old.sendall(b"x" * 100)
        assert not answers(old)
        with connect(proxy) as new:
            assert echo(new) == b"hello"
            proxy.heal()
            assert echo(new) == b"hello"
        old.settimeout(5)
        with pytest.raises(ConnectionResetError):
            old.recv(1)


def test_a_connection_is_cut_after_as_many_bytes_as_wanted(proxy: Proxy) -> None:
    proxy.cut_after(3)
    with connect(proxy) as peer:
        peer.sendall(b"hello")
        got = b""
        try:
            while data := peer.recv(10):
                got += data
        except ConnectionResetError:
            assert got in (b"", b"hel")  # a reset may overtake the bytes before it
        else:
            pytest.fail("the connection was not reset")
    proxy.heal()
    with connect(proxy) as peer:
        assert echo(peer) == b"hello"
