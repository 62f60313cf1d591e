"""Recurring requests: cron expressions by the rules of Debian's cron, in a time zone; kept in MongoDB."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pymongo.database import Database

from agentq.errors import InvalidRequest, NotFound

Doc = dict[str, Any]


def next_time(cron: str, timezone: str, after: datetime) -> datetime | None:
    """The first time after ``after`` that fits, in UTC; None if there is none in 50 years.

    Raises ``InvalidRequest`` with the codes ``bad_cron`` and ``bad_timezone``. A time that does not exist on the day
    the clocks go forward is made up for right after, one that comes twice fires once, as Debian's cron does.
    """
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidRequest(
            f"There is no time zone {timezone[:80]!r}.", code="bad_timezone", hint="Use a name like Europe/Zurich."
        ) from None
    try:
        found = next(CronSim(cron, after.astimezone(zone)), None)
    except CronSimError as error:
        raise InvalidRequest(
            f"{cron[:80]!r} is no cron expression: {error}.",
            code="bad_cron",
            hint="Five fields: minute hour day month weekday, as in '30 9 * * MON-FRI'.",
        ) from None
    return None if found is None else found.astimezone(UTC)


class Schedules:
    """The collection of recurring requests. Raises what pymongo raises."""

    def __init__(self, db: Database[Doc], now: Callable[[], datetime]) -> None:
        self._schedules = db["schedules"]
        self._now = now

    def add(self, request: Doc, cron: str, timezone: str) -> str:
        """Keep a validated request; gives the schedule's id."""
        if "idempotency_key" in request or "at" in request or "expires_at" in request:
            raise InvalidRequest(
                "A recurring request has no 'idempotency_key', 'at' or 'expires_at' of its own.",
                code="not_for_schedule",
                hint="Use 'delay_s' and 'deadline_s', which count from each time anew.",
                field="request",
            )
        due = next_time(cron, timezone, self._now())
        if due is None:
            raise InvalidRequest(f"{cron!r} fits no time in 50 years.", code="bad_cron", hint="Correct the date.")
        doc = {"_id": f"c{os.urandom(8).hex()}", "cron": cron, "timezone": timezone, "request": request, "due": due,
               "created_at": self._now(), "last_run": None, "last_error": None}  # fmt: skip
        self._schedules.insert_one(doc)
        return str(doc["_id"])

    def all(self) -> list[Doc]:
        return list(self._schedules.find({}).sort("due", 1))

    def drop(self, schedule_id: str) -> None:
        if self._schedules.delete_one({"_id": str(schedule_id)}).deleted_count == 0:
            raise NotFound(f"There is no schedule {schedule_id!r}.", hint="'agentq schedule list' shows them.")

    def handed_in(self, schedule: Doc, run_id: str | None, fault: Doc | None) -> None:
        """Set when it is due next. No effect if it was set already."""
        due = next_time(schedule["cron"], schedule["timezone"], max(self._now(), schedule["due"]))
        told = {"due": due, "last_run": run_id, "last_error": fault, "last_at": schedule["due"]}
        self._schedules.update_one({"_id": schedule["_id"], "due": schedule["due"]}, {"$set": told})
