"""How MongoDB reads what the admission asks at every tick: its work must not grow with the lines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from agentq.protocol import Request
from agentq.run import new_run
from agentq.store.backlog_queries import IN_FLIGHT, first_of_line, first_runs, joining
from agentq.store.mongo import MongoStore
from tests.unit.runtime.world import Shop, make_bundle

pytestmark = pytest.mark.servers
FLOWS, LONG = 5, 60


@pytest.fixture
async def store(mongo_url: str, database: str) -> AsyncIterator[MongoStore]:
    """Five lines of sixty runs each, and a run of each flow in flight."""
    store = MongoStore(mongo_url, database)
    await store.open()
    registered = make_bundle(Shop().toolbox()).registered()
    await store.runs.insert_many(
        dict(new_run(Request(input="hello", tenant=f"t{flow}"), registered, run_id=f"r{flow}-{number:02d}",
                     now=store.now(), waits=number > 0))
        for flow in range(FLOWS) for number in range(LONG + 1)
    )  # fmt: skip
    yield store
    await store._client.drop_database(store._db.name)
    await store.close()


async def explain(store: MongoStore, pipeline: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    command = {"aggregate": "runs", "pipeline": pipeline, "cursor": {}, **options}
    told = await store._db.command("explain", command, verbosity="executionStats")
    return dict(told["stages"][0]["$cursor"] if "stages" in told else told)


async def test_who_waits_is_read_at_one_place_of_the_index_for_each_flow(store: MongoStore) -> None:
    told = await explain(store, first_runs("standard", "router"))
    assert "DISTINCT_SCAN" in str(told["queryPlanner"]["winningPlan"])
    assert told["executionStats"]["totalKeysExamined"] <= 2 * FLOWS
    assert told["executionStats"]["totalDocsExamined"] == 0


async def test_the_heads_of_a_line_are_read_and_no_more(store: MongoStore) -> None:
    told = await explain(store, first_of_line("standard", "router", "t1", 4))
    assert told["executionStats"]["totalDocsExamined"] <= 5


async def test_what_is_in_flight_is_read_from_the_index_alone(store: MongoStore) -> None:
    told = await explain(store, IN_FLIGHT, hint="flight")
    assert told["executionStats"]["totalDocsExamined"] == 0
    assert told["executionStats"]["totalKeysExamined"] <= 2 * FLOWS


async def test_what_waits_for_a_job_is_read_from_the_index_alone(store: MongoStore) -> None:
    joins = {"step": "s1", "endpoint": "o/m", "since": store.now(), "until": store.now()}
    await store.runs.update_many({"flow": {"$in": ["t1", "t2"]}}, {"$set": {"joins": joins, "cost": 7}})
    told = await explain(store, joining(["t1"]), hint="joining")
    assert told["executionStats"]["totalDocsExamined"] == 0
    assert told["executionStats"]["totalKeysExamined"] <= LONG + 2
