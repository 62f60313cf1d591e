"""An operator's acts on a store: read the run, decide (``agentq.engine.repair``), commit on the condition that it has
not moved, decide again if it has. ``by`` is the operator's name; it stands in the audit trail of every run touched.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from jsonschema import Draft202012Validator
from referencing import Registry

from agentq.engine import repair
from agentq.engine.advance import enter_run
from agentq.engine.commit import plan
from agentq.engine.decision import Decision
from agentq.engine.edits import Edits, editable
from agentq.engine.fork import Forked, fork
from agentq.engine.replay import hashes
from agentq.engine.stuck import Stuck, stuck
from agentq.errors import Conflict, InvalidRequest, NotFound
from agentq.protocol import TERMINAL
from agentq.run import new_run_id
from agentq.runtime.bundles import Bundles
from agentq.store import documents
from agentq.store.api import Letters, Store, Verdict
from schemas.catalog import Bundle
from schemas.run import RunDoc, Step

Kind = Literal["quarantined", "held", "rejected"]
KINDS: tuple[Kind, ...] = ("quarantined", "held", "rejected")
RACES = 10  # lost in a row before an act gives up
LOOK_S = 0.25
ALIVE = timedelta(seconds=15)
MOST_LIVE_RUNS = 20_000  # looked at by a list of live runs


class Operator:
    """What one person does. All methods may raise ``Unavailable`` and may be repeated then."""

    def __init__(self, store: Store, by: str) -> None:
        self._store = store
        self._by = by
        self._bundles = Bundles(store)

    async def load(self, run_id: str) -> RunDoc:
        """The run with its journal. Raises ``NotFound``."""
        run = await self._store.load(run_id, journal=True)
        if run is None:
            raise NotFound(f"There is no run {run_id!r}.", hint="'agentq runs' lists the latest.")
        return run

    async def editable(self, run: RunDoc) -> dict[str, Any]:
        """What may be edited about a failed run, as it is: see ``agentq.engine.edits.editable``."""
        bundle = await self._bundles.of(run)
        return editable(bundle, run, run["quarantine"]["step"] if "quarantine" in run else None)

    # -- dead letters -----------------------------------------------------------------------------------------------

    async def dead_letters(self, kinds: Collection[Kind], which: Letters, limit: int) -> list[tuple[Kind, RunDoc]]:
        """What needs a person, by kind, newest first in each. Held ones are sought among MOST_LIVE_RUNS live runs."""
        found: list[tuple[Kind, RunDoc]] = []
        if "quarantined" in kinds:
            found += [("quarantined", run) for run in await self._store.dead_letters("quarantined", which, limit)]
        if "held" in kinds and which.code in (None, repair.UNKNOWN):
            held = [run async for run in self._live() if repair.held_steps(run) and documents.fits(run, which)]
            found += [("held", await self._entered(run)) for run in held[:limit]]
        if "rejected" in kinds:
            found += [("rejected", run) for run in await self._store.dead_letters("rejected", which, limit)]
        return found

    async def _live(self) -> AsyncIterator[RunDoc]:
        seen = 0
        async for run in self._store.unended():
            yield run
            seen += 1
            if seen == MOST_LIVE_RUNS:
                return

    async def retry(self, run_id: str, edits: Edits | None = None, step_id: str | None = None) -> RunDoc:
        """A failed run goes on where it failed, a held step is done again. The run as it is then."""
        run = await self.load(run_id)
        if run["status"] in TERMINAL:
            return await self._redrive(run, edits or Edits())
        if edits is not None and edits.told():
            raise Conflict(
                f"Run {run_id} has not failed; a held step is done again as it is.",
                hint=f"agentq dlq retry {run_id}, or fork the run from that step with other values.",
            )
        return await self._act(run_id, lambda fresh: repair.retry_held(fresh, self._by, self._store.now(), step_id))

    async def _redrive(self, run: RunDoc, edits: Edits) -> RunDoc:
        for _ in range(RACES):
            edits = await self._with_models(edits)
            acted = repair.redrive(await self._known(run), run, edits, self._by, self._store.now())
            if edits.payload is not None:
                failed = run["quarantine"]["step_id"] or ""
                _check_arguments(acted.bundle, acted.decision.opened[failed].payload["name"], edits)
            if acted.bundle.hash != run["workflow"]["hash"]:
                await self._store.keep_bundle(acted.bundle)
            if after := await self._commit(run, acted.decision):
                return after
            run = await self.load(run["_id"])
        raise _moves(run["_id"])

    async def resolve(self, run_id: str, step_id: str | None, text: str) -> RunDoc:
        """A held step has happened; ``text`` is what the model sees of it."""
        for _ in range(RACES):
            run = await self._entered(await self.load(run_id))
            bundle = await self._bundles.of(run)
            decision = repair.resolve_held(bundle, run, step_id, text, self._by, self._store.now())
            if after := await self._commit(run, decision):
                return after
        raise _moves(run_id)

    async def load_letter(self, run_id: str) -> RunDoc:
        """A dead letter as it is shown: a first step whose outcome is unknown says what it really is."""
        return await self._entered(await self.load(run_id))

    async def _entered(self, run: RunDoc) -> RunDoc:
        """What the first step of a run is shows only when it is claimed; here it is shown without."""
        first = next((key for key in repair.held_steps(run) if run["steps"][key]["kind"] == "enter"), None)
        if first is None:
            return run
        bundle = await self._bundles.of(run)
        known = await self._store.history(run, bundle.workflow.limits.history_tokens) if (run["turn"] or 0) > 1 else []
        return enter_run(bundle, run, first, known, int(self._store.now().timestamp() * 1000))

    async def drop(self, run_id: str, reason: str) -> RunDoc:
        """Nothing more is to be done about it; a live run is cancelled."""
        return await self._act(run_id, lambda run: repair.drop(run, self._by, reason, self._store.now()))

    async def handed_in_again(self, run_id: str, new_run: str, *, edited: bool) -> RunDoc:
        """A refused request has become the run ``new_run``; it is not listed any more."""
        return await self._act(
            run_id,
            lambda run: repair.handed_in_again(run, new_run, self._by, self._store.now(), edited=edited),
        )

    # -- single runs ------------------------------------------------------------------------------------------------

    async def pause(self, run_id: str, reason: str) -> RunDoc:
        return await self._act(run_id, lambda run: repair.pause(run, reason, self._by, self._store.now()))

    async def resume(self, run_id: str) -> RunDoc:
        return await self._act(run_id, lambda run: repair.resume(run, self._by, self._store.now()))

    async def fork(self, run_id: str, step_id: str, edits: Edits) -> Forked:
        """Store a new run that begins before ``step_id`` of another; the scheduler dispatches it."""
        run = await self.load(run_id)
        made = fork(
            await self._known(run), run, step_id, await self._with_models(edits), run_id=new_run_id(), by=self._by,
            now=self._store.now(),
        )  # fmt: skip
        await self._store.keep_bundle(made.bundle)
        await self._store.record(made.run)
        return made

    async def stuck(self, limit: int) -> tuple[list[tuple[RunDoc, Stuck]], int]:
        """Live runs that do not get on, and how many live runs were looked at: MOST_LIVE_RUNS at most."""
        found: list[tuple[RunDoc, Stuck]] = []
        seen = 0
        async for run in self._live():
            seen += 1
            if (why := stuck(run, self._store.now())) is not None and len(found) < limit:
                entered = await self._entered(run)
                found.append((entered, stuck(entered, self._store.now()) or why))
        return found, seen

    # -- after a restore --------------------------------------------------------------------------------------------

    async def restore_check(self, *, apply: bool, release: bool) -> Counter[str]:
        """Settle what every live run may do after the database has gone back in time. Counts, by what is done.

        Raises ``Conflict`` while a scheduler or a worker shows signs of life: they would act on what is to be settled.
        """
        if alive := await self._store.alive(ALIVE):
            raise Conflict(
                f"Still alive: {', '.join(alive)}.",
                code="system_is_running",
                hint=f"Stop schedulers and workers, and wait {ALIVE.seconds} s.",
            )
        counts: Counter[str] = Counter()
        async for run in self._store.unended():
            bundle = await self._bundles.of(run)
            decision = repair.after_restore(bundle, run, self._by, self._store.now(), release=release)
            counts["live runs"] += 1
            if decision is None:
                counts["left as they are"] += 1
                continue
            held = sum(1 for opening in decision.opened.values() if opening.held is not None)
            counts["steps held for a person"] += held
            counts["steps tried again"] += len(decision.opened) - held
            counts["leases removed"] += len(run["leases"])
            counts["runs paused"] += decision.status == "paused"
            if apply and await self._commit(run, decision) is None:
                raise _moves(run["_id"])
        return counts

    # -- inside -----------------------------------------------------------------------------------------------------

    async def _act(self, run_id: str, decide: Callable[[RunDoc], Decision]) -> RunDoc:
        for _ in range(RACES):
            run = await self.load(run_id)
            if after := await self._commit(run, decide(run)):
                return after
        raise _moves(run_id)

    async def _commit(self, run: RunDoc, decision: Decision) -> RunDoc | None:
        planned = plan(run, decision, now=self._store.now())
        return planned.after if await self._store.commit(planned) is Verdict.APPLIED else None

    async def _known(self, run: RunDoc) -> dict[str, Bundle]:
        return {name: await self._bundles.get(name) for name in hashes(run)}

    async def _with_models(self, edits: Edits) -> Edits:
        if edits.model is None:
            return edits
        models = {name: model for bundle in await self._store.current() for name, model in bundle.models.items()}
        return replace(edits, models=models)


def _check_arguments(bundle: Bundle, tool: str, edits: Edits) -> None:
    """Raises ``InvalidRequest`` where edited arguments do not fit the tool's schema."""
    if tool not in bundle.tools:
        raise InvalidRequest(f"There is no tool {tool!r}.", code="invalid_edit", hint="Edit another part of the run.")
    validator = Draft202012Validator(bundle.tools[tool].parameters, registry=Registry())
    if errors := sorted(f"{error.json_path}: {error.message}" for error in validator.iter_errors(edits.payload)):
        raise InvalidRequest(
            f"The arguments do not fit the tool {tool}: {'; '.join(errors[:3])}.", code="invalid_edit",
            hint="Correct them.",
        )  # fmt: skip


def _moves(run_id: str) -> Conflict:
    return Conflict(f"Run {run_id} moved on each time it was decided about.", code="moves", hint="Try again.")


# -- many at once ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Wave:
    """What came of redriving many: run ids that were started, refusals by run id, and why it stopped early."""

    started: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None


async def retry_many(
    run_ids: Sequence[str],
    retry: Callable[[str], Awaitable[str]],
    status: Callable[[str], Awaitable[str]],
    *,
    canary: int = 0,
    rate_per_s: float | None = None,
    canary_s: float = 600.0,
    now: Callable[[], datetime],
) -> Wave:
    """Retry runs one after the other, at most ``rate_per_s`` of them a second; first ``canary`` of them, and the others
    only if those have succeeded within ``canary_s``.

    ``retry`` starts one again and gives the id of the run that goes on (what is wrong with one is noted, and the others
    go on); ``status`` tells how a run is.
    """
    wave = Wave()
    for index, run_id in enumerate(run_ids):
        if canary and index == canary and (why := await _canary_failed(wave, status, canary_s, now)) is not None:
            wave.stopped = why
            return wave
        try:
            wave.started.append(await retry(run_id))
        except (Conflict, InvalidRequest, NotFound) as error:
            wave.refused[run_id] = str(error)
        if rate_per_s is not None and index < len(run_ids) - 1:
            await asyncio.sleep(1 / rate_per_s)
    return wave


async def _canary_failed(
    wave: Wave, status: Callable[[str], Awaitable[str]], within_s: float, now: Callable[[], datetime]
) -> str | None:
    if wave.refused or not wave.started:
        return f"{len(wave.refused)} of the first runs could not be started"
    until = now() + timedelta(seconds=within_s)
    left = list(wave.started)
    while left:
        found = await status(left[0])
        if found == "succeeded":
            left.pop(0)
        elif found in TERMINAL or found in ("waiting", "paused"):
            return f"run {left[0]} has not succeeded, it is {found}"
        elif now() >= until:
            return f"run {left[0]} is still {found} after {within_s:g} s"
        else:
            await asyncio.sleep(LOOK_S)
    return None


def affected(kind: Kind, run: RunDoc) -> tuple[str, str, str]:
    """Of a dead letter: its code, the step in question with its kind, and what was said about it."""
    if kind == "rejected":
        return str((run["error"] or {}).get("code", "")), "-", str((run["error"] or {}).get("message", ""))
    if kind == "held":
        steps = repair.held_steps(run)
        return repair.UNKNOWN, ", ".join(f"{key} {_named(run['steps'][key])}" for key in steps), "did it happen?"
    kept = run["quarantine"]
    where = "-" if kept["step_id"] is None or kept["step"] is None else f"{kept['step_id']} {_named(kept['step'])}"
    return kept["code"], where, kept["message"]


def _named(step: Step) -> str:
    return str(step["payload"].get("name") or step["kind"])
