"""A job of a provider's batch endpoint: model calls of many runs in one file. See ``agentq.engine.joining``.

Which calls are in it is written in their runs (``RunDoc.joins``); this document says how far the job has got.
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import Literal, NamedTuple, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

JOB_FORMAT = 1  # version of the job document; raised when old code could not read a new document
JobStatus = Literal["open", "sending", "sent", "cancelling", "done", "given_up"]
JOB_ENDED: frozenset[str] = frozenset({"done", "given_up"})


@with_config(ConfigDict(extra="forbid"))
class JobLease(TypedDict):
    """Which scheduler works on the job, and until when by MongoDB's clock."""

    holder: str
    until: datetime


@with_config(ConfigDict(extra="forbid"))
class JobDoc(TypedDict):
    """``open``: its runs are being marked. ``sending``: from here on the provider may have it, under our ``_id`` as its
    name. ``sent``: ``provider_id`` is known. ``cancelling``: given up, what is answered still counts. ``done``: every
    answer is in its run. ``given_up``: the provider would not have it (``error``), its calls are made live.

    ``until``: when the first of its calls must be made live; ``due``: when to look at it next; ``tries``: failures to
    reach the provider in a row. ``calls``, ``answered``, ``cost_nano_usd`` count what it came to; ``batches`` whose
    lines are in it.
    """

    _id: str
    v: int
    endpoint: str
    status: JobStatus
    live: bool
    calls: int
    batches: list[str]
    created_at: datetime
    until: datetime
    due: datetime
    tries: int
    lease: JobLease | None
    provider_id: NotRequired[str]
    sent_at: NotRequired[datetime]
    ended_at: NotRequired[datetime]
    answered: int
    cost_nano_usd: int
    error: str | None


JOB: TypeAdapter[JobDoc] = TypeAdapter(JobDoc)


class Place(NamedTuple):
    """Which attempt at which step of which run a line of a job is."""

    run_id: str
    step_id: str
    attempt: int


def new_job_id(epoch_ms: int) -> str:
    """``job_`` + 12 hex digits of epoch milliseconds + 8 random hex digits."""
    return f"job_{epoch_ms:012x}{os.urandom(4).hex()}"


def custom_id(place: Place) -> str:
    """What a line is called at the provider."""
    return f"{place.run_id}-{place.step_id}-{place.attempt}"


def place_of(custom_id: str) -> Place | None:
    """The other way round; None for a name that is not ours."""
    parts = custom_id.rsplit("-", 2)
    if len(parts) != 3 or not parts[2].isdecimal() or len(parts[2]) > 9:
        return None
    return Place(parts[0], parts[1], int(parts[2]))
