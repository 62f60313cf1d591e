"""OpenAI's batch endpoint: many chat completions as one file, answered within a day at a part of the price.

``POST /files`` (purpose ``batch``), ``POST /batches``, ``GET /batches/{id}``, ``GET /files/{id}/content``. The endpoint
knows no idempotency key, so a job carries our name for it in its metadata: whoever does not know whether a job was
created looks for that (``find``). Every method raises ``ProviderError`` and nothing else; only ``send`` must not be
repeated blindly.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, BinaryIO, NamedTuple, cast

import aiohttp

from agentq.llm import errors, openai, wire
from agentq.llm.endpoints import Endpoints, Provider
from agentq.llm.types import LlmCall, LlmReply
from schemas.catalog import ModelSpec

MAX_JOB_BYTES = 100 * 1024 * 1024  # OpenAI takes 200 MB
_MAX_ANSWER_BYTES = 8 * 1024 * 1024
_TRANSFER_S = 600.0  # a file up or down
_CALL_S = 60.0
_URL = "/v1/chat/completions"
_NAME = "agentq_job"
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_IN_MEMORY = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as the provider tells it. ``asked``: the file that was handed in; ``files``: where its answers are, once it
    has ended; ``error``: why it failed."""

    id: str
    status: str
    asked: str
    files: tuple[str, ...]
    error: str | None

    @property
    def ended(self) -> bool:
        return self.status in _ENDED


class JobLine(NamedTuple):
    """What a job says of one call: ``status`` and ``body`` as of a live call, or status 0: the call was not made."""

    custom_id: str
    status: int
    body: dict[str, Any]


def encode(call: LlmCall, custom_id: str) -> bytes:
    """One call as a line of a job's file."""
    _, _, body = openai.encode(call)
    return wire.dumps({"custom_id": custom_id, "method": "POST", "url": _URL, "body": body}) + b"\n"


def decode(call: LlmCall, line: JobLine) -> LlmReply:
    """The answer to a call that was made. Raises ``ProviderError`` as a live call does."""
    if 200 <= line.status < 300:
        return openai.read(call, line.body)
    raise errors.from_status(line.status, {}, wire.dumps(line.body), where=call.model.provider)


def usage_of(line: JobLine) -> tuple[int, int]:
    """The tokens of input and output of an answer that nobody reads; 0 where it does not say."""
    usage = line.body.get("usage")
    told = usage if isinstance(usage, dict) else {}
    return int(_number(told.get("prompt_tokens"))), int(_number(told.get("completion_tokens")))


class OpenAiJobs:
    """A client of the endpoint; one event loop, ``close`` it there."""

    def __init__(self, providers: Mapping[str, Provider]) -> None:
        self._endpoints = Endpoints(providers)
        self._session: aiohttp.ClientSession | None = None

    async def send(self, model: ModelSpec, lines: BinaryIO, name: str) -> str:
        """Hand in a file of lines as a new job called ``name``; gives the provider's id of it.

        After an error nobody knows whether the job exists: see ``find``.
        """
        lines.seek(0)
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", lines, filename=f"{name}.jsonl", content_type="application/jsonl")
        file = await self._json(model, "POST", "/files", data=form, timeout_s=_TRANSFER_S)
        wanted = {
            "input_file_id": _id(file), "endpoint": _URL, "completion_window": "24h", "metadata": {_NAME: name},
        }  # fmt: skip
        return _id(await self._json(model, "POST", "/batches", json=wanted))

    async def find(self, model: ModelSpec, name: str, since: datetime) -> str | None:
        """The provider's id of the job called ``name``, which was handed in ``since`` then, if there is one."""
        oldest = (since - timedelta(minutes=10)).timestamp()
        after: str | None = None
        while True:
            query = {"limit": "100"} | ({} if after is None else {"after": after})
            page = await self._json(model, "GET", "/batches", params=query)
            jobs = [job for job in page.get("data") or [] if isinstance(job, dict)]
            for job in jobs:
                if (job.get("metadata") or {}).get(_NAME) == name:
                    return _id(job)
            if not page.get("has_more") or not jobs or min(_number(job.get("created_at")) for job in jobs) < oldest:
                return None
            after = _id(jobs[-1])

    async def look(self, model: ModelSpec, job_id: str) -> JobState:
        """How a job is."""
        return _state(await self._json(model, "GET", f"/batches/{job_id}"))

    async def cancel(self, model: ModelSpec, job_id: str) -> None:
        """Ask for a job's end: what it has answered stays and is paid, the other calls are not made."""
        await self._json(model, "POST", f"/batches/{job_id}/cancel")

    async def answers(self, model: ModelSpec, state: JobState) -> AsyncIterator[JobLine]:
        """What an ended job says of its calls, in any order. Each file is fetched whole before its first line."""
        for file_id in state.files:
            with tempfile.SpooledTemporaryFile(_IN_MEMORY) as file:
                async with self._exchange(model, "GET", f"/files/{file_id}/content", _TRANSFER_S) as response:
                    async for chunk in response.content.iter_any():
                        file.write(chunk)
                file.seek(0)
                for line in _lines(cast("BinaryIO", file)):
                    yield line

    async def forget(self, model: ModelSpec, state: JobState) -> None:
        """Remove the files of an ended job from the provider: they hold prompts and answers."""
        for file_id in (*state.files, *([state.asked] if state.asked else [])):
            await self._json(model, "DELETE", f"/files/{file_id}")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _json(
        self, model: ModelSpec, method: str, path: str, timeout_s: float = _CALL_S, **sent: Any
    ) -> dict[str, Any]:
        async with self._exchange(model, method, path, timeout_s, **sent) as response:
            return wire.loads(await response.read())

    @asynccontextmanager
    async def _exchange(
        self, model: ModelSpec, method: str, path: str, timeout_s: float, **sent: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        endpoint = self._endpoints.of(model, "", {})
        url = endpoint.url.with_path(endpoint.url.path.rstrip("/") + path)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=model.connect_timeout_s)
        try:
            async with self._opened().request(
                method, url, headers=endpoint.headers, timeout=timeout, allow_redirects=False, **sent
            ) as response:
                if not 200 <= response.status < 300:
                    said = await response.content.read(_MAX_ANSWER_BYTES)
                    raise errors.from_status(
                        response.status, response.headers, said, where=endpoint.where, api_key=endpoint.api_key
                    )
                yield response
        except errors.FAILURES as error:
            raise errors.from_exception(error, where=endpoint.where) from None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        return self._session


def _lines(file: BinaryIO) -> Iterator[JobLine]:
    """The lines that can be read; one that cannot leaves its call without an answer, as a missing one does."""
    while raw := file.readline(_MAX_ANSWER_BYTES):
        try:
            line = json.loads(raw)
            custom_id = line["custom_id"]
        except (ValueError, RecursionError, KeyError, TypeError):
            continue
        response = line.get("response")
        if isinstance(response, dict) and isinstance(response.get("body"), dict):
            yield JobLine(str(custom_id), int(_number(response.get("status_code"))), response["body"])
        else:
            yield JobLine(str(custom_id), 0, {})


def _state(job: dict[str, Any]) -> JobState:
    files = tuple(job[name] for name in ("output_file_id", "error_file_id") if isinstance(job.get(name), str))
    faults = ((job.get("errors") or {}).get("data") or [{}]) if job.get("status") == "failed" else []
    error = wire.text_of(faults[0].get("code"), "failed") if faults and isinstance(faults[0], dict) else None
    return JobState(_id(job), wire.text_of(job.get("status")), wire.text_of(job.get("input_file_id")), files, error)


def _id(answer: dict[str, Any]) -> str:
    if not isinstance(answer.get("id"), str):
        raise errors.bad_response("it has no id")
    return cast("str", answer["id"])


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0
