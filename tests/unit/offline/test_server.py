"""The server over real HTTP: both wire formats, every fault, the journal, the entry point."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agentq.engine.prompts import VERDICT_SCHEMA, route_schema
from agentq.errors import ConfigError
from agentq.offline.faults import load_scenario, parse_scenario
from agentq.offline.server import Running, offline_server
from tests.unit.offline.library import OPTIONS, ROUTER, TOOLS

OPENAI_TOOLS = [{"type": "function", "function": schema} for schema in TOOLS]
TURN = {
    "model": "strong",
    "messages": [{"role": "system", "content": "You help."}, {"role": "user", "content": "When is LN-104 due?"}],
    "tools": OPENAI_TOOLS,
}
ROUTE = {
    "model": "fast",
    "messages": [{"role": "system", "content": ROUTER}, {"role": "user", "content": "Please renew my loan"}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "route", "schema": route_schema(OPTIONS)}},
}


async def ask(
    http: aiohttp.ClientSession, server: Running, body: dict[str, Any], path: str = "/v1/chat/completions"
) -> dict[str, Any]:
    async with http.post(server.url + path, json=body, headers={"Idempotency-Key": "r1:s1"}) as response:
        assert response.status == 200, await response.text()
        assert "not a language model" in response.headers["X-Agentq-Offline"]
        found: dict[str, Any] = await response.json()
        return found


async def rule(http: aiohttp.ClientSession, server: Running, action: dict[str, Any], **more: Any) -> None:
    scenario = {"rules": [{"action": action, **more}]}
    async with http.post(f"{server.url}/_scenario", json=scenario) as response:
        assert response.status == 200, await response.text()


async def journal(http: aiohttp.ClientSession, server: Running) -> list[dict[str, Any]]:
    async with http.get(f"{server.url}/_calls") as response:
        calls: list[dict[str, Any]] = (await response.json())["calls"]
        return calls


class TestOpenAI:
    async def test_a_turn_asks_for_tools_and_counts_tokens(self, http: aiohttp.ClientSession, server: Running) -> None:
        answer = await ask(http, server, TURN)
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        call = choice["message"]["tool_calls"][0]
        assert call["function"]["name"] == "get_loan"
        assert json.loads(call["function"]["arguments"]) == {"loan_id": "LN-104"}
        usage = answer["usage"]
        assert usage["prompt_tokens"] > 100
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    async def test_a_tool_result_leads_to_the_answer(self, http: aiohttp.ClientSession, server: Running) -> None:
        message = (await ask(http, server, TURN))["choices"][0]["message"]
        result = {
            "role": "tool",
            "tool_call_id": message["tool_calls"][0]["id"],
            "content": '{"summary": "It is due."}',
        }
        answer = await ask(http, server, {**TURN, "messages": [*TURN["messages"], message, result]})
        assert answer["choices"][0]["message"]["content"] == "It is due."
        assert answer["choices"][0]["finish_reason"] == "stop"

    async def test_structured_output_fits_the_schema(self, http: aiohttp.ClientSession, server: Running) -> None:
        answer = await ask(http, server, ROUTE)
        assert json.loads(answer["choices"][0]["message"]["content"])["route"] == "loans"

    @pytest.mark.parametrize("body", [TURN, ROUTE])
    async def test_a_stream_holds_the_same_answer(
        self, http: aiohttp.ClientSession, server: Running, body: dict[str, Any]
    ) -> None:
        whole = (await ask(http, server, body))["choices"][0]["message"]
        chunks = await stream(http, server, {**body, "stream": True, "stream_options": {"include_usage": True}})
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == (whole["content"] or "")
        called = [call["function"]["name"] for delta in deltas for call in delta.get("tool_calls", [])]
        assert called == [call["function"]["name"] for call in whole.get("tool_calls", [])]
        assert chunks[-1]["usage"]["completion_tokens"] > 0

    @pytest.mark.parametrize(
        "body", [{}, {"model": "m"}, {"model": "m", "messages": [3]}, {"model": 1, "messages": []}]
    )
    async def test_a_body_that_is_no_request_is_refused(
        self, http: aiohttp.ClientSession, server: Running, body: dict[str, Any]
    ) -> None:
        async with http.post(f"{server.url}/v1/chat/completions", json=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]["type"] == "invalid_request_error"


async def stream(http: aiohttp.ClientSession, server: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with http.post(f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.content_type == "text/event-stream"
        lines = [line[6:] for line in (await response.text()).split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


class TestAnthropic:
    BODY = {
        "model": "claude",
        "max_tokens": 200,
        "system": "You help.",
        "messages": [{"role": "user", "content": "When is LN-104 due?"}],
        "tools": [
            {"name": schema["name"], "description": schema["description"], "input_schema": schema["parameters"]}
            for schema in TOOLS
        ],
    }

    async def test_a_turn_asks_for_tools_and_reads_their_results(
        self, http: aiohttp.ClientSession, server: Running
    ) -> None:
        asked = await ask(http, server, self.BODY, "/v1/messages")
        assert asked["stop_reason"] == "tool_use"
        use = asked["content"][0]
        assert (use["name"], use["input"]) == ("get_loan", {"loan_id": "LN-104"})
        assert asked["usage"]["input_tokens"] > 100
        result = {
            "type": "tool_result",
            "tool_use_id": use["id"],
            "content": [{"type": "text", "text": '{"summary": "Due."}'}],
        }
        talk = [
            *self.BODY["messages"],
            {"role": "assistant", "content": asked["content"]},
            {"role": "user", "content": [result]},
        ]
        answer = await ask(http, server, {**self.BODY, "messages": talk}, "/v1/messages")
        assert answer["content"] == [{"type": "text", "text": "Due."}]
        assert answer["stop_reason"] == "end_turn"

    async def test_a_forced_tool_is_filled_as_the_answer(self, http: aiohttp.ClientSession, server: Running) -> None:
        body = {
            "model": "claude", "max_tokens": 200, "system": ROUTER,
            "messages": [{"role": "user", "content": "Please renew my loan"}],
            "tools": [{"name": "route", "input_schema": route_schema(OPTIONS)}],
            "tool_choice": {"type": "tool", "name": "route"},
        }  # fmt: skip
        answer = await ask(http, server, body, "/v1/messages")
        assert answer["content"][0]["name"] == "route"
        assert answer["content"][0]["input"]["route"] == "loans"

    async def test_an_output_format_is_answered_as_text(self, http: aiohttp.ClientSession, server: Running) -> None:
        body = {
            "model": "claude", "max_tokens": 200,
            "messages": [{"role": "user", "content": "## Request\nx?\n\n## Tool results\n\n## Draft answer\nIt is 5."}],
            "output_config": {"format": {"type": "json_schema", "schema": VERDICT_SCHEMA}},
        }  # fmt: skip
        answer = await ask(http, server, body, "/v1/messages")
        assert json.loads(answer["content"][0]["text"])["verdict"] == "revise"

    async def test_a_stream_holds_the_same_blocks(self, http: aiohttp.ClientSession, server: Running) -> None:
        async with http.post(f"{server.url}/v1/messages", json={**self.BODY, "stream": True}) as response:
            events = [json.loads(line[6:]) for line in (await response.text()).split("\n") if line.startswith("data: ")]
        assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
        raw = "".join(e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta")
        assert json.loads(raw) == {"loan_id": "LN-104"}


class TestFaults:
    async def test_a_status_with_retry_after_then_normal_again(
        self, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await rule(http, server, {"status": 429, "retry_after": 1.5}, times=2)
        for _ in range(2):
            async with http.post(f"{server.url}/v1/chat/completions", json=ROUTE) as response:
                assert response.status == 429
                assert response.headers["Retry-After"] == "1.5"
                assert (await response.json())["error"]["type"] == "rate_limit_error"
        await ask(http, server, ROUTE)
        assert [call["status"] for call in await journal(http, server)] == [429, 429, 200]

    @pytest.mark.parametrize("status", [500, 529])
    async def test_a_server_error_in_anthropics_form(
        self, http: aiohttp.ClientSession, server: Running, status: int
    ) -> None:
        await rule(http, server, {"status": status})
        async with http.post(f"{server.url}/v1/messages", json=TestAnthropic.BODY) as response:
            assert response.status == status
            assert (await response.json())["error"]["type"] == ("api_error" if status == 500 else "overloaded_error")

    async def test_latency_delays_the_answer(self, http: aiohttp.ClientSession, server: Running) -> None:
        await rule(http, server, {"latency_ms": 80})
        loop = asyncio.get_running_loop()
        began = loop.time()
        await ask(http, server, ROUTE)
        assert loop.time() - began >= 0.08

    async def test_a_held_connection_says_nothing(self, http: aiohttp.ClientSession, server: Running) -> None:
        await rule(http, server, {"time_out": True}, times=1)
        limit = aiohttp.ClientTimeout(total=0.2)
        with pytest.raises(TimeoutError):
            await http.post(f"{server.url}/v1/chat/completions", json=ROUTE, timeout=limit)
        await ask(http, server, ROUTE)
        assert [call["fault"] for call in await journal(http, server)] == ["time_out", None]

    async def test_a_hold_that_ends_closes_the_connection(self, http: aiohttp.ClientSession, server: Running) -> None:
        await rule(http, server, {"time_out": True, "hold_s": 0.05})
        with pytest.raises(aiohttp.ClientError):
            await http.post(f"{server.url}/v1/chat/completions", json=ROUTE)

    async def test_a_stopping_server_lets_go_of_held_connections(self, http: aiohttp.ClientSession) -> None:
        async with asyncio.timeout(10):
            async with offline_server(
                scenario=parse_scenario({"rules": [{"action": {"time_out": True}}]}, "test")
            ) as held:
                waiting = asyncio.create_task(http.post(f"{held.url}/v1/chat/completions", json=ROUTE))
                while not await journal(http, held):
                    pass
            with pytest.raises(aiohttp.ClientError):
                await waiting

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_a_cut_body_ends_early(self, http: aiohttp.ClientSession, server: Running, streamed: bool) -> None:
        await rule(http, server, {"cut": True})
        async with http.post(f"{server.url}/v1/chat/completions", json={**ROUTE, "stream": streamed}) as response:
            assert response.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()

    async def test_malformed_json_is_whole_but_no_json(self, http: aiohttp.ClientSession, server: Running) -> None:
        await rule(http, server, {"malformed": True})
        async with http.post(f"{server.url}/v1/chat/completions", json=ROUTE) as response:
            body = await response.read()
        with pytest.raises(ValueError, match="line 1"):
            json.loads(body)

    async def test_wrong_arguments_and_unknown_tools(self, http: aiohttp.ClientSession, server: Running) -> None:
        await rule(http, server, {"wrong_arguments": True})
        call = (await ask(http, server, TURN))["choices"][0]["message"]["tool_calls"][0]
        assert json.loads(call["function"]["arguments"]) == {"wrong_argument": 1}
        await rule(http, server, {"unknown_tool": True})
        call = (await ask(http, server, TURN))["choices"][0]["message"]["tool_calls"][0]
        assert call["function"]["name"] == "get_loan_v2"

    async def test_an_answer_without_usage(self, http: aiohttp.ClientSession, server: Running) -> None:
        await rule(http, server, {"no_usage": True})
        assert "usage" not in await ask(http, server, ROUTE)

    async def test_an_invented_sentence(self, http: aiohttp.ClientSession, server: Running) -> None:
        talk = [*TURN["messages"][:1], {"role": "user", "content": "hello"}]
        await rule(http, server, {"invent": "It costs 999 USD."}, match={"purpose": "turn"})
        answer = await ask(http, server, {**TURN, "messages": talk})
        assert answer["choices"][0]["message"]["content"].endswith("It costs 999 USD.")

    async def test_a_rule_meets_only_the_calls_it_names(self, http: aiohttp.ClientSession, server: Running) -> None:
        match = {"model": "fast", "purpose": "route", "contains": "RENEW", "nth": 2}
        await rule(http, server, {"status": 500}, match=match)
        other = {**ROUTE, "messages": [*ROUTE["messages"][:1], {"role": "user", "content": "a room"}]}
        for body in (ROUTE, TURN, other, ROUTE, ROUTE):
            async with http.post(f"{server.url}/v1/chat/completions", json=body) as response:
                await response.read()
        assert [call["status"] for call in await journal(http, server)] == [200, 200, 200, 500, 200]


class TestControl:
    async def test_the_journal_holds_keys_and_purposes_but_no_text(
        self, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await ask(http, server, TURN)
        (call,) = await journal(http, server)
        assert (call["purpose"], call["model"], call["key"], call["status"]) == ("turn", "strong", "r1:s1", 200)
        assert call["tools"] == ["get_loan"]
        assert "LN-104" not in json.dumps(call)

    async def test_the_journal_can_be_forgotten(self, http: aiohttp.ClientSession, server: Running) -> None:
        await ask(http, server, TURN)
        await http.delete(f"{server.url}/_calls")
        assert await journal(http, server) == []

    async def test_it_says_plainly_that_it_is_no_language_model(
        self, http: aiohttp.ClientSession, server: Running
    ) -> None:
        async with http.get(f"{server.url}/health") as response:
            health = await response.json()
        assert health["language_model"] is False
        assert "not a language model" in health["about"]
        async with http.get(f"{server.url}/v1/models") as response:
            models = await response.json()
        assert all("not a language model" in model["description"] for model in models["data"])
        assert {model["owned_by"] for model in models["data"]} == {"agentq-offline"}

    async def test_wrong_rules_are_refused_and_change_nothing(
        self, http: aiohttp.ClientSession, server: Running
    ) -> None:
        await rule(http, server, {"status": 500})
        async with http.post(f"{server.url}/_scenario", json={"rules": [{"acton": {}}]}) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "config_error"
        async with http.post(f"{server.url}/v1/chat/completions", json=ROUTE) as response:
            assert response.status == 500


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rules: [{action: {status: 200}}]", "rules.0.action.status"),
        ("rules: [{action: {latency: 5}}]", "rules.0.action.latency"),
        ("rules: [{match: {purpose: sing}, action: {}}]", "rules.0.match.purpose"),
        ("rules: [{action: {status: 500, cut: true}}]", "one failure a rule"),
        ("rules: [{action: {retry_after: 3}}]", "goes with a status"),
        ("rules: [{action: {}, times: 0}]", "rules.0.times"),
        ("batches: {second: 1}", "batches.second"),
        ("batches: {second: 1}", "there may be seconds, stuck, partial"),
        ("batches: {seconds: -1}", "batches.seconds"),
        ("batches: {partial: 1.5, stuck: true}", "batches.partial"),
        ("batches: {window_s: 0}", "batches.window_s"),
        ("batches: {refuse: 200}", "batches.refuse"),
        ("batches: {stuck: true, seconds: 1}", "a stuck batch never completes"),
        ("batches: {partial: 0.5}", "partial goes with seconds or stuck"),
        ("batches: {refuse: 500, lose_answer: true}", "one failure of the creation"),
        ("batches: {retry_after: 1, lose_answer: true}", "retry_after goes with refuse"),
        ("batches: {times: 1}", "times goes with refuse or lose_answer"),
        ("rules: {", "no YAML"),
        ("[1]", "the top level"),
    ],
)
def test_a_wrong_scenario_file_is_refused_with_its_place(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load_scenario(path)
    assert named in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_missing_scenario_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_scenario(tmp_path / "none.yaml")


def test_an_empty_scenario_file_has_no_rules(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text("")
    assert load_scenario(path).rules == []


class TestEntryPoint:
    async def test_it_writes_the_port_answers_and_ends_on_a_signal(
        self, tmp_path: Path, http: aiohttp.ClientSession, checkout: Path
    ) -> None:
        scenario, port_file = tmp_path / "scenario.yaml", tmp_path / "port"
        scenario.write_text("rules: [{match: {nth: 1}, action: {status: 503}}]")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "agentq.offline", "--scenario", str(scenario), "--port-file", str(port_file),
            cwd=checkout, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        url = f"http://127.0.0.1:{int(port_file.read_text())}"
        assert url in line
        assert "no language model" in line
        async with http.post(f"{url}/v1/chat/completions", json=ROUTE) as response:
            assert response.status == 503
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0

    async def test_a_wrong_scenario_ends_it_with_one_clear_sentence(self, tmp_path: Path, checkout: Path) -> None:
        scenario = tmp_path / "scenario.yaml"
        scenario.write_text("rules: [{action: {statsu: 500}}]")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "agentq.offline",
            "--scenario",
            str(scenario),
            cwd=checkout,
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await process.communicate()
        assert process.returncode == 2
        assert b"rules.0.action.statsu" in said
        assert b"Traceback" not in said
