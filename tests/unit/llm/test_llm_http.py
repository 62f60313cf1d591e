"""The transport over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time

import pytest
from llm_calls import a_call, a_model
from model_server import ANTHROPIC_OK, OPENAI_OK, Exchange, ModelServer, ok

from agentq.errors import ConfigError, ProviderError
from agentq.llm.endpoints import Endpoints, Provider
from agentq.llm.http import HttpLlm
from agentq.llm.types import LlmCall, LlmReply

KEY = "k-0123456789abcdef"


async def ask(server_url: str, call: LlmCall | None = None, **options) -> LlmReply:
    """One call through a transport of its own."""
    llm = HttpLlm({"openai": Provider(server_url + "/v1", KEY), "anthropic": Provider(server_url, KEY)}, **options)
    try:
        return await llm.complete(call or a_call(key="run-1:s1"))
    finally:
        await llm.close()


async def fails(behave, call: LlmCall | None = None, **options) -> ProviderError:
    async with ModelServer(behave) as server:
        with pytest.raises(ProviderError) as caught:
            await ask(server.url, call, **options)
    assert KEY not in repr(caught.value) + str(caught.value) + str(caught.value.as_dict())
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "the cause holds the headers"
    return caught.value


async def test_an_openai_call_carries_key_idempotency_key_and_body():
    async with ModelServer(ok) as server:
        reply = await ask(server.url)
    (request,) = server.requests
    assert (reply.text, reply.usage) == ("Hi.", {"input_tokens": 3, "output_tokens": 2})
    assert reply.latency_ms >= 0
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["idempotency-key"] == "run-1:s1"
    assert request.headers["content-type"] == "application/json"
    assert request.json["messages"] == [{"role": "user", "content": "Where is my order A-17?"}]


async def test_an_anthropic_call_carries_its_own_headers_and_path():
    async with ModelServer(ok) as server:
        reply = await ask(server.url + "/proxy/", a_call("anthropic"))
    (request,) = server.requests
    assert reply.text == "Hi."
    assert request.path == "/proxy/v1/messages"
    assert request.headers["x-api-key"] == KEY
    assert request.headers["anthropic-version"] == "2023-06-01"
    assert "authorization" not in request.headers
    assert "idempotency-key" not in request.headers, "the call has no key"


async def test_the_models_address_overrides_the_providers_and_keeps_its_query():
    async with ModelServer(ok) as server:
        await ask("http://127.0.0.1:1", a_call(model={"base_url": server.url + "/azure?api-version=7"}))
    assert server.requests[0].path == "/azure/chat/completions?api-version=7"


async def test_without_a_key_none_is_sent():
    async with ModelServer(ok) as server:
        llm = HttpLlm({"openai": Provider(server.url)})
        await llm.complete(a_call())
        await llm.close()
    assert "authorization" not in server.requests[0].headers


async def test_connections_are_kept_and_shared():
    async with ModelServer(ok) as server:
        llm = HttpLlm({"openai": Provider(server.url)})
        for _ in range(5):
            await llm.complete(a_call())
        assert server.connections == 1
        await llm.close()
        await llm.complete(a_call())
        assert server.connections == 2, "a call after close() opens a new session"
        await llm.close()


async def test_many_calls_are_in_flight_at_once_unless_limited():
    async def barrier(exchange: Exchange) -> None:
        if len(server.requests) == 150:
            release.set()
        await release.wait()
        await ok(exchange)

    release = asyncio.Event()
    async with ModelServer(barrier) as server:
        llm = HttpLlm({"openai": Provider(server.url)})
        replies = await asyncio.gather(*(llm.complete(a_call()) for _ in range(150)))
        await llm.close()
    assert len(replies) == server.connections == 150


async def test_a_connection_limit_is_kept_and_waiting_for_one_counts():
    async with ModelServer(ok) as server:
        llm = HttpLlm({"openai": Provider(server.url)}, max_connections=2)
        await asyncio.gather(*(llm.complete(a_call()) for _ in range(20)))
        await llm.close()
        assert server.connections <= 2

    async def never(_: Exchange) -> None:
        await asyncio.Event().wait()

    async with ModelServer(never) as server:
        llm = HttpLlm({"openai": Provider(server.url)}, max_connections=1)
        call = a_call(model={"read_timeout_s": 0.1})
        done = await asyncio.gather(llm.complete(call), llm.complete(call), return_exceptions=True)
        await llm.close()
    assert {getattr(error, "code", error) for error in done} <= {"read_timeout", "connect_timeout"}


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_a_429_is_rate_limited_with_the_providers_wish(provider):
    async def limit(exchange: Exchange) -> None:
        await exchange.answer({"error": {"type": "rate_limit_error", "message": "slow down"}}, 429, Retry_After="7")

    error = await fails(limit, a_call(provider))
    assert (error.code, error.retryable, error.retry_after_s) == ("rate_limited", True, 7.0)
    assert error.details["provider_code"] == "rate_limit_error"


async def test_a_refused_request_names_the_providers_reason_but_not_the_prompt():
    async def refuse(exchange: Exchange) -> None:
        said = json.dumps([exchange.json["messages"], exchange.headers["authorization"]])
        message = f"Bad field 'max_tokens' in {said}"
        await exchange.answer({"error": {"message": message, "code": "bad_field"}}, 400)

    error = await fails(refuse)
    assert (error.code, error.details["provider_code"]) == ("bad_model_request", "bad_field")
    assert "A-17" not in str(error)


async def test_a_redirect_is_refused_and_not_followed():
    async def redirect(exchange: Exchange) -> None:
        await exchange.answer(b"", 307, Location="/elsewhere")

    assert (await fails(redirect)).code == "bad_model_request"


async def test_a_server_that_is_silent_is_a_read_timeout_and_the_connection_closes():
    async def silent(exchange: Exchange) -> None:
        await exchange.client_gone()

    async with ModelServer(silent) as server:
        with pytest.raises(ProviderError) as caught:
            await ask(server.url, a_call(model={"read_timeout_s": 0.1}))
        assert (caught.value.code, caught.value.retryable) == ("read_timeout", True)
        await server.all_gone()


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
async def test_a_server_that_drips_does_not_stretch_the_deadline(head):
    """The time limit is for the whole answer: neither slow headers nor a slow body renew it."""

    async def drip(exchange: Exchange) -> None:
        await exchange.send(head or b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not exchange.writer.transport.is_closing():
            await exchange.send(b"a")
            await asyncio.sleep(0.01)

    started = time.monotonic()
    error = await fails(drip, a_call(model={"read_timeout_s": 0.2}))
    assert error.code == "read_timeout"
    assert time.monotonic() - started < 2


async def test_nobody_listening_is_connect_failed():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ProviderError) as caught:
            await ask(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert (caught.value.code, caught.value.retryable) == ("connect_failed", True)


async def test_a_name_nobody_has_is_connect_failed():
    Endpoints.only_loopback = False  # this host cannot exist (RFC 6761); the switch is restored by the fixture
    with pytest.raises(ProviderError) as caught:
        await ask("http://no-such-host.invalid")
    assert (caught.value.code, caught.value.retryable) == ("connect_failed", True)


async def test_a_full_backlog_is_a_connect_timeout():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:  # nobody accepts: the kernel's queue is full after these
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        with pytest.raises(ProviderError) as caught:
            await ask(f"http://127.0.0.1:{full.getsockname()[1]}", a_call(model={"connect_timeout_s": 0.1}))
        for filler in fillers:
            filler.close()
    assert (caught.value.code, caught.value.retryable) == ("connect_timeout", True)


async def test_plain_http_on_a_tls_address_is_connect_failed():
    async def no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 No\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(no_tls, "127.0.0.1", 0)
    async with server:
        with pytest.raises(ProviderError) as caught:
            await ask(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert (caught.value.code, caught.value.retryable) == ("connect_failed", True)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [',
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n{"choices": [\r\n',
    ],
)
async def test_a_connection_that_ends_too_early_is_a_cut_response_and_is_not_sent_again(raw):
    async def cut(exchange: Exchange) -> None:
        await exchange.send(raw)
        exchange.writer.close()

    async with ModelServer(cut) as server:
        with pytest.raises(ProviderError) as caught:
            await ask(server.url)
    assert (caught.value.code, caught.value.retryable) == ("response_cut", True)
    assert len(server.requests) == 1


async def test_a_kept_connection_closed_by_the_server_is_not_retried_blindly():
    """Nobody can tell whether the request was processed, so the journal decides, not the transport."""

    async def once_then_cut(exchange: Exchange) -> None:
        if len(server.requests) > 1:
            exchange.writer.close()
        else:
            await ok(exchange)

    async with ModelServer(once_then_cut) as server:
        llm = HttpLlm({"openai": Provider(server.url)})
        await llm.complete(a_call())
        with pytest.raises(ProviderError) as caught:
            await llm.complete(a_call())
        await llm.close()
    assert (caught.value.code, len(server.requests), server.connections) == ("response_cut", 2, 1)


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: banana\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{]{]{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nContent-Encoding: gzip\r\n\r\nnot gzip!",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx",
    ],
)
async def test_malformed_http_and_malformed_json_are_bad_responses(raw):
    error = await fails(lambda exchange: exchange.send(raw))
    assert error.code in {"bad_response", "response_cut"}
    assert error.retryable


async def test_a_compressed_answer_is_read():
    async def zipped(exchange: Exchange) -> None:
        await exchange.answer(gzip.compress(json.dumps(OPENAI_OK).encode()), Content_Encoding="gzip")

    async with ModelServer(zipped) as server:
        assert (await ask(server.url)).text == "Hi."


@pytest.mark.parametrize("compress", [False, True])
async def test_an_answer_that_is_too_large_is_dropped_before_it_is_read_whole(compress):
    async def flood(exchange: Exchange) -> None:
        data = b" " * 4_000_000
        if compress:
            await exchange.answer(gzip.compress(data), Content_Encoding="gzip")
        else:
            await exchange.answer(data)

    error = await fails(flood, max_response_bytes=100_000)
    assert (error.code, error.retryable) == ("response_too_large", False)


async def test_cancelling_a_call_closes_its_connection():
    async def hold(exchange: Exchange) -> None:
        await exchange.client_gone()

    async with ModelServer(hold) as server:
        llm = HttpLlm({"openai": Provider(server.url)})
        task = asyncio.create_task(llm.complete(a_call()))
        await server.arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.all_gone()
        await llm.close()


async def test_closing_fails_the_calls_in_flight():
    async def hold(exchange: Exchange) -> None:
        await exchange.client_gone()

    async with ModelServer(hold) as server:
        llm = HttpLlm({"openai": Provider(server.url)})
        task = asyncio.create_task(llm.complete(a_call()))
        await server.arrived.wait()
        await llm.close()
        with pytest.raises(ProviderError) as caught:
            await task
    assert (caught.value.code, caught.value.retryable) == ("response_cut", True)


async def test_a_prompt_of_megabytes_is_sent_whole():
    async with ModelServer(ok) as server:
        await ask(server.url, a_call(messages=[{"role": "user", "content": "ä" * 1_500_000}]))
    assert server.requests[0].json["messages"][0]["content"] == "ä" * 1_500_000


async def test_a_lone_surrogate_in_the_prompt_does_not_stop_the_call():
    async with ModelServer(ok) as server:
        await ask(server.url, a_call(messages=[{"role": "user", "content": "a\ud800b"}]))
    assert server.requests[0].json["messages"][0]["content"] == "a?b"


@pytest.mark.parametrize(
    "call",
    [
        a_call(key="a\nb"),
        a_call("anthropic", messages=[{"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "name": "t", "arguments": {"n": float("nan")}}]}]),
    ],
)  # fmt: skip
async def test_a_call_that_cannot_be_put_on_the_wire_is_a_bad_model_request(call):
    async with ModelServer(ok) as server:
        with pytest.raises(ProviderError) as caught:
            await ask(server.url, call)
    assert (caught.value.code, caught.value.retryable) == ("bad_model_request", False)
    assert not server.requests


def test_one_transport_serves_several_event_loops_each_with_its_own_session():
    server_loop = asyncio.new_event_loop()
    thread = threading.Thread(target=server_loop.run_forever)
    thread.start()
    server = ModelServer(ok)
    asyncio.run_coroutine_threadsafe(server.__aenter__(), server_loop).result()
    llm = HttpLlm({"openai": Provider(server.url)})

    async def twice() -> None:
        await llm.complete(a_call())
        await llm.complete(a_call())
        await llm.close()

    asyncio.run(twice())
    asyncio.run(twice())
    asyncio.run_coroutine_threadsafe(server.__aexit__(), server_loop).result()
    server_loop.call_soon_threadsafe(server_loop.stop)
    thread.join()
    server_loop.close()
    assert (len(server.requests), server.connections) == (4, 2)


def test_a_session_belongs_to_the_process_that_opened_it(monkeypatch):
    """After a fork the child has the parent's loop object; it must not send on the parent's sockets."""

    async def scenario() -> None:
        async with ModelServer(ok) as server:
            llm = HttpLlm({"openai": Provider(server.url)})
            await llm.complete(a_call())
            with monkeypatch.context() as forked:
                forked.setattr("os.getpid", lambda: -1)
                await llm.complete(a_call())
                assert server.connections == 2
                await llm.close()
            await llm.complete(a_call())
            assert server.connections == 2, "the parent goes on with its own"
            await llm.close()

    asyncio.run(scenario())


async def test_the_kill_switch_stops_everything_but_loopback():
    llm = HttpLlm({"openai": Provider("https://api.openai.com/v1", KEY)})
    for base_url in (None, "http://127.0.0.2.example.org", "http://10.0.0.1", "http://[2001:db8::1]"):
        with pytest.raises(ProviderError) as caught:
            await llm.complete(a_call(model={"base_url": base_url}))
        assert (caught.value.code, caught.value.retryable) == ("real_model_refused", False)
    assert not llm._sessions, "nothing was opened"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_the_kill_switch_lets_loopback_through(host):
    async with ModelServer(ok) as server:
        assert (await ask(server.url.replace("127.0.0.1", host))).text == "Hi."


async def test_a_provider_nobody_configured_is_said_so():
    with pytest.raises(ProviderError) as caught:
        await HttpLlm({}).complete(a_call())
    assert caught.value.code == "provider_not_configured"


async def test_a_models_address_that_is_none_is_said_so():
    with pytest.raises(ProviderError) as caught:
        await HttpLlm({"openai": Provider("http://127.0.0.1")}).complete(a_call(model={"base_url": "ftp://x"}))
    assert (caught.value.code, caught.value.retryable) == ("bad_base_url", False)


def test_a_provider_never_shows_its_key():
    assert KEY not in repr(Provider("https://api.openai.com/v1", KEY))


@pytest.mark.parametrize(
    ("base_url", "key"),
    [("", "k"), ("api.openai.com", "k"), ("ftp://x", "k"), ("http://", "k"), ("http://u:p@h", "k"), ("http://h:x", "k"),
     ("http://h", KEY + "\n"), ("http://h", "a b"), ("http://h", "schlüssel")],
)  # fmt: skip
def test_a_provider_that_cannot_work_is_refused_at_start(base_url, key):
    with pytest.raises(ConfigError) as caught:
        Provider(base_url, key)
    assert KEY not in str(caught.value)
    assert "schlüssel" not in str(caught.value)


def test_the_endpoint_cache_does_not_show_the_key():
    llm = HttpLlm({"openai": Provider("http://127.0.0.1", KEY)})
    assert KEY not in repr(vars(llm))
    assert a_model().base_url is None
    assert ANTHROPIC_OK
