"""The admission's decision: nobody starves, shares follow weights, room is used, quotas hold."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentq.engine.admission import CLASSES, SHARES, Books, Decision, Line, Quota, Waiting, correct, decide, tenant_of
from agentq.engine.window import AIM_S, LEAST, Sight, Window, adapt
from agentq.protocol import Priority

WIDE = 10**9


def line(tenant: str, costs: list[int], *, rank: int = 4, more: bool = False) -> Line:
    return Line([Waiting(f"{tenant}-{index:06d}", rank, cost) for index, cost in enumerate(costs)], more)


@dataclass
class Backlog:
    """Endless lines of costs, shown a few heads at a time, as a store would."""

    costs: dict[tuple[Priority, str], Any]
    shown: int = 5
    taken: Counter[tuple[Priority, str]] = field(default_factory=Counter)
    spent: Counter[tuple[Priority, str]] = field(default_factory=Counter)

    def lines(self) -> dict[Priority, dict[str, Line]]:
        found: dict[Priority, dict[str, Line]] = {}
        for (priority, flow), cost in self.costs.items():
            first = self.taken[priority, flow]
            heads = [Waiting(f"{flow}-{number:07d}", 4, cost(number)) for number in range(first, first + self.shown)]
            found.setdefault(priority, {})[flow] = Line(heads, more=True)
        return found

    def book(self, decision: Decision) -> None:
        for priority, flow, run in decision.admitted:
            self.taken[priority, flow] += 1
            self.spent[priority, flow] += run.cost

    def admit(self, books: Books, count: int, **options: Any) -> Books:
        while count > 0:
            options.setdefault("window", WIDE)
            options.setdefault("flight", {})
            decision = decide(books, self.lines(), limit=count, **options)
            self.book(decision)
            if not decision.admitted:
                assert decision.wanted, "there is room and work, and nothing was admitted"
                self.shown += 5
            count -= len(decision.admitted)
            books = decision.books
        return books


@pytest.mark.parametrize("seed", range(5))
def test_over_ten_thousand_decisions_each_tenant_gets_its_weight_in_cost_within_five_percent(seed: int) -> None:
    """Whatever its runs cost and however long its backlog is."""
    rng = random.Random(seed)
    weights = {f"t{index}": rng.choice((0.5, 1.0, 2.0, 3.0, 7.0)) for index in range(10)}
    scale = {tenant: rng.choice((1_000, 50_000, 1_000_000)) for tenant in weights}
    backlog = Backlog(
        {
            ("batch", tenant): (lambda number, tenant=tenant: 1 + number * 7919 % (2 * scale[tenant]))
            for tenant in weights
        }
    )
    backlog.shown = 60
    backlog.admit(Books(), 10_000, weights=weights)
    total, heavy = sum(backlog.spent.values()), sum(weights.values())
    dearest = 2 * max(scale.values())
    for tenant, weight in weights.items():
        fair = total * weight / heavy
        assert abs(backlog.spent["batch", tenant] - fair) <= 0.05 * fair + dearest * max(1.0, weight)


def test_the_shares_hold_in_small_rooms_too_and_no_room_is_left_unused() -> None:
    """Ten thousand decisions of 1 to 16 runs each, whatever each run costs."""
    rng = random.Random(7)
    weights = {f"t{index}": rng.choice((0.5, 1.0, 2.0, 3.0, 7.0)) for index in range(8)}
    costs = [rng.randrange(1, 5_000) for _ in range(997)]
    backlog = Backlog({("batch", tenant): (lambda number: costs[number % 997]) for tenant in weights}, shown=16)
    books = Books()
    for _ in range(10_000):
        room = rng.randint(1, 16)
        decision = decide(books, backlog.lines(), window=room, flight={}, weights=weights)
        assert len(decision.admitted) == room
        backlog.book(decision)
        books = decision.books
    total, heavy = sum(backlog.spent.values()), sum(weights.values())
    for tenant, weight in weights.items():
        assert backlog.spent["batch", tenant] == pytest.approx(total * weight / heavy, rel=0.05)


def test_weights_of_three_to_one_share_three_to_one_whatever_the_backlogs() -> None:
    backlog = Backlog({("batch", "a"): lambda _: 1_000, ("batch", "b"): lambda _: 1_000})
    backlog.admit(Books(), 10_000, weights={"a": 3.0, "b": 1.0})
    assert backlog.taken["batch", "a"] == pytest.approx(7_500, abs=2)


def test_the_actual_cost_corrects_a_wrong_estimate() -> None:
    """One tenant's runs cost five times what was estimated: over time it gets a fifth of the runs, half of the cost."""
    backlog = Backlog({("batch", "cheap"): lambda _: 1_000, ("batch", "dear"): lambda _: 1_000})
    books = Books()
    for _ in range(2_000):
        before = backlog.taken["batch", "dear"]
        books = backlog.admit(books, 5)
        for _ in range(backlog.taken["batch", "dear"] - before):
            books = correct(books, "batch", "dear", 1.0, 4_000)
    actual = backlog.taken["batch", "dear"] * 5_000, backlog.taken["batch", "cheap"] * 1_000
    assert actual[0] == pytest.approx(actual[1], rel=0.05)


def test_a_refund_counts_though_others_were_served_meanwhile() -> None:
    """Costs a tenth of the estimate: the credit of a tenant that always has work is not cut."""
    backlog = Backlog({("batch", "over"): lambda _: 10_000, ("batch", "right"): lambda _: 1_000})
    books = Books()
    for _ in range(2_000):
        before = backlog.taken["batch", "over"]
        books = backlog.admit(books, 5)
        for _ in range(backlog.taken["batch", "over"] - before):
            books = correct(books, "batch", "over", 1.0, -9_000)
    assert backlog.taken["batch", "over"] == pytest.approx(backlog.taken["batch", "right"], rel=0.05)


@pytest.mark.parametrize("first", [None, *CLASSES])
def test_every_class_that_has_work_gets_its_reserved_share(first: Priority | None) -> None:
    """Also after one of them had everything for itself for a long time: no debt is left from that."""
    backlog = Backlog({(priority, "t"): lambda _: 1_000 for priority in CLASSES})
    books = Books()
    if first is not None:
        books = Backlog({(first, "t"): lambda _: 1_000}).admit(books, 3_000)
    backlog.admit(books, 10_000)
    for priority in CLASSES:
        assert backlog.taken[priority, "t"] >= SHARES[priority] * 10_000 * 0.95 - 20
    assert backlog.taken["interactive", "t"] >= (SHARES["interactive"] + 0.08) * 10_000, "what is left goes by urgency"


def test_an_urgent_request_enters_a_full_window_as_long_as_its_class_is_below_its_reserve() -> None:
    lines: dict[Priority, dict[str, Line]] = {
        "interactive": {"a": line("a", [5] * 50)},
        "batch": {"b": line("b", [5] * 50, more=True)},
    }
    found = decide(Books(), lines, window=20, flight={"batch": 20})
    assert [one.priority for one in found.admitted] == ["interactive"] * 10
    found = decide(Books(), lines, window=20, flight={"batch": 10, "interactive": 9})
    assert [one.priority for one in found.admitted] == ["interactive"]


def test_within_a_tenant_the_more_urgent_number_goes_first_then_the_older() -> None:
    lines: dict[Priority, dict[str, Line]] = {
        "standard": {
            "t|k1": Line([Waiting("r1", 2, 1), Waiting("r5", 4, 1)]),
            "t|k2": Line([Waiting("r3", 0, 1), Waiting("r4", 4, 1)]),
        }
    }
    found = decide(Books(), lines, window=WIDE, flight={})
    assert [one.run.run_id for one in found.admitted] == ["r3", "r1", "r4", "r5"]


def test_a_tenant_that_comes_back_starts_level_with_the_others() -> None:
    """Idleness earns no credit: it does not get the next thousand places."""
    alone = Backlog({("batch", "busy"): lambda _: 1_000})
    books = alone.admit(Books(), 1_000)
    both = Backlog({("batch", "busy"): lambda _: 1_000, ("batch", "back"): lambda _: 1_000})
    both.admit(books, 100)
    assert both.taken["batch", "back"] == pytest.approx(50, abs=2)


def test_a_newcomer_starts_level_with_those_who_work_though_a_refund_took_them_back() -> None:
    """A tenant alone whose runs cost a tenth of the estimate owes nothing to the next one, nor the next one to it."""
    alone, books = Backlog({("batch", "first"): lambda _: 10_000}), Books()
    for _ in range(50):
        books = alone.admit(books, 5)
        for _ in range(5):
            books = correct(books, "batch", "first", 1.0, -9_000)
    both = Backlog({("batch", "first"): lambda _: 1_000, ("batch", "second"): lambda _: 1_000})
    both.admit(books, 200)
    assert both.taken["batch", "first"] == pytest.approx(100, abs=2)


COST = st.integers(1, 5_000)
TENANTS = st.sampled_from(["a", "b", "c", "a|k1", "a|k2", "d"])
LINES = st.dictionaries(
    st.sampled_from(CLASSES), st.dictionaries(TENANTS, st.lists(COST, max_size=8), max_size=5), max_size=3
)
QUOTAS = st.dictionaries(
    TENANTS,
    st.builds(
        Quota,
        st.none() | st.integers(0, 6),
        st.none() | st.integers(0, 10_000),
        st.none() | st.integers(0, 6),
        st.booleans(),
    ),
)


def known(found: dict[Priority, dict[str, list[int]]]) -> dict[Priority, dict[str, Line]]:
    return {
        priority: {flow: line(f"{priority}-{flow}", costs) for flow, costs in flows.items()}
        for priority, flows in found.items()
    }


@settings(max_examples=100, deadline=None)
@given(LINES, QUOTAS, st.integers(0, 30), st.integers(0, 10), st.integers(0, 30))
def test_quotas_and_window_hold_and_no_room_is_left_unused(
    waiting: dict[Priority, dict[str, list[int]]], quotas: dict[str, Quota], window: int, urgent: int, batch: int
) -> None:
    lines = known(waiting)
    flight: dict[Priority, int] = {"interactive": urgent, "batch": batch}
    found = decide(Books(), lines, window=window, flight=flight, quotas=quotas)
    ids = [one.run.run_id for one in found.admitted]
    assert len(ids) == len(set(ids))
    runs: Counter[str] = Counter()
    spend: Counter[str] = Counter()
    now: Counter[str] = Counter(flight)
    for one in found.admitted:
        reserve = max(1, int(SHARES[one.priority] * window)) if window else 0
        assert now.total() < window or now[one.priority] < reserve
        now[one.priority] += 1
        for name in {one.flow, tenant_of(one.flow)}:
            runs[name] += 1
            spend[name] += one.run.cost
    for name, quota in quotas.items():
        assert quota.runs is None or runs[name] <= quota.runs
        assert quota.rate is None or runs[name] <= quota.rate
        assert quota.spend is None or spend[name] <= quota.spend or (quota.idle and runs[name] == 1)
        if runs[name]:
            assert found.quotas[name].runs == (None if quota.runs is None else quota.runs - runs[name])
    if now.total() < window:  # work-conserving: what is left is stopped by a quota, its own or its tenant's
        for flows in lines.values():
            for flow, one in flows.items():
                rest = [run for run in one.heads if run.run_id not in ids]
                assert (
                    not rest
                    or any(
                        name in found.quotas and not found.quotas[name].allows(rest[0].cost)
                        for name in (flow, tenant_of(flow))
                    )
                    or _tenant_is_stopped(lines, flow, found.quotas, set(ids))
                )


def _tenant_is_stopped(lines: dict[Priority, dict[str, Line]], flow: str, quotas: Any, admitted: set[str]) -> bool:
    """The tenant's own quota stops the run that is first among its flows: nothing cheaper overtakes it."""
    tenant = tenant_of(flow)
    if tenant not in quotas:
        return False
    for flows in lines.values():
        for other, one in flows.items():
            rest = [run for run in one.heads if run.run_id not in admitted]
            if tenant_of(other) == tenant and rest and not quotas[tenant].allows(rest[0].cost):
                return True
    return False


@settings(max_examples=15, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.tuples(st.integers(500, 5_000), st.sampled_from([0.5, 1.0, 4.0])), min_size=2
    ),
    st.sampled_from(CLASSES),
    st.integers(1, 20),
)
def test_nobody_starves(tenants: dict[str, tuple[int, float]], urgent: Priority, room: int) -> None:
    """Whatever the others' weights, costs and classes, and however little room there is at a time: every tenant's next
    run goes after a bounded cost of others."""
    costs = {("batch", tenant): (lambda _, cost=cost: cost) for tenant, (cost, _) in tenants.items()}
    backlog = Backlog({**costs, (urgent, "rich"): lambda _: 2_000}, shown=30)
    weights = {"rich": 4.0, **{tenant: weight for tenant, (_, weight) in tenants.items()}}
    books = Books()
    for tenant, (cost, weight) in tenants.items():
        turn = sum(weights.values()) * cost / weight + 5_000 * (len(tenants) + 1)  # within its class
        before, spent = backlog.taken["batch", tenant], backlog.spent.total()
        while backlog.taken["batch", tenant] == before:
            books = backlog.admit(books, room, weights=weights)
            assert backlog.spent.total() - spent <= 2 * turn / SHARES["batch"] + room * 5_000


def test_a_cap_on_money_lets_one_run_through_that_costs_more_and_no_other_beside_it() -> None:
    """Else it would wait for ever, and with it everything behind it; a cap of nothing is no cap for one."""
    lines: dict[Priority, dict[str, Line]] = {"batch": {"t": line("t", [500, 1])}}
    found = decide(Books(), lines, window=WIDE, flight={}, quotas={"t": Quota(spend=100, idle=True)})
    assert [one.run.cost for one in found.admitted] == [500]
    for stopped in (Quota(spend=100), Quota(spend=0, idle=True)):
        assert decide(Books(), lines, window=WIDE, flight={}, quotas={"t": stopped}).admitted == []


def test_a_dear_run_of_one_key_is_not_overtaken_for_ever_by_cheap_ones_of_another() -> None:
    """The tenant's money in flight ends, then the dear one goes, then the others again: nobody of them starves."""
    cap, flying, went = 10, 8, []
    keys = {"t|dear": [50], "t|cheap": [4] * 6}
    for _ in range(10):
        lines: dict[Priority, dict[str, Line]] = {
            "batch": {key: Line([Waiting(f"{key}-{10 - len(costs)}", key == "t|cheap", cost) for cost in costs[:1]])
                      for key, costs in keys.items()}
        }  # fmt: skip
        quotas = {"t": Quota(spend=cap - flying, idle=flying == 0)}
        flying = 0  # all that was in flight ends before the next look
        for one in decide(Books(), lines, window=WIDE, flight={}, quotas=quotas).admitted:
            keys[one.flow].pop(0)
            went.append(one.run.cost)
            flying += one.run.cost
    assert went == [50, 4, 4, 4, 4, 4, 4]


def test_a_key_that_is_stopped_by_its_own_cap_does_not_stop_the_tenants_other_keys() -> None:
    lines: dict[Priority, dict[str, Line]] = {"batch": {"t|k": line("t|k", [500]), "t|l": line("t|l", [1])}}
    found = decide(Books(), lines, window=WIDE, flight={}, quotas={"t|k": Quota(spend=100)})
    assert [one.flow for one in found.admitted] == ["t|l"]


def test_an_unknown_head_stops_the_decision_and_names_what_must_be_fetched() -> None:
    """Going past a line of which only the head is known would take places from its tenant."""
    lines: dict[Priority, dict[str, Line]] = {"batch": {"a": line("a", [1, 1], more=True), "b": line("b", [1] * 10)}}
    found = decide(Books(), lines, window=WIDE, flight={})
    assert found.wanted == {("batch", "a")}
    assert Counter(one.flow for one in found.admitted)["b"] <= 3


def test_what_the_books_remember_of_an_order_changes_no_decision() -> None:
    """It spares the next decision work. Runs come and are withdrawn, quotas and windows change, costs are corrected."""
    for seed in range(30):
        rng = random.Random(seed)
        hall = Hall(rng)
        kept, anew = Books(), Books()
        for _ in range(40):
            hall.change()
            lines, options = hall.lines(), hall.options()
            decision, again = decide(kept, lines, **options), decide(without_order(anew), lines, **options)
            assert decision == again
            assert decision == decide(kept, lines, **options), "the books it was given are as they were"
            kept, anew = decision.books, again.books
            hall.leave(decision)
            for priority, flow, _ in rng.sample(decision.admitted, len(decision.admitted) // 3):
                difference = rng.randint(-3_000, 3_000)
                kept = correct(kept, priority, tenant_of(flow), 1.0, difference)
                anew = correct(anew, priority, tenant_of(flow), 1.0, difference)


def without_order(books: Books) -> Books:
    return replace(books, ledgers={name: replace(ledger, order=None) for name, ledger in books.ledgers.items()})


class Hall:
    """Lines of a few tenants and their keys, of which nothing stays as it is."""

    FLOWS = ("a", "a|1", "a|2", "b", "b|1", "c", "d", "e")

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.born = 0
        self.runs: dict[tuple[Priority, str], list[Waiting]] = {}

    def change(self) -> None:
        for _ in range(self.rng.randrange(12)):
            self.born += 1
            line = self.runs.setdefault((self.rng.choice(CLASSES), self.rng.choice(self.FLOWS)), [])
            line.append(Waiting(f"r{self.born:05d}", self.rng.randrange(10), self.rng.choice((1, 500, 3_000))))
            line.sort(key=lambda run: (run.rank, run.run_id))
        if self.rng.random() < 0.1:
            self.runs = {name: runs for name, runs in self.runs.items() if self.rng.random() < 0.6}

    def lines(self) -> dict[Priority, dict[str, Line]]:
        shown = self.rng.choice((0, 1, 3, 100))
        found: dict[Priority, dict[str, Line]] = {}
        for (priority, flow), runs in self.runs.items():
            found.setdefault(priority, {})[flow] = Line(runs[:shown], len(runs) > shown)
        return found

    def options(self) -> dict[str, Any]:
        rng = self.rng
        return {
            "window": rng.choice((0, 1, 4, 16, 64)),
            "flight": {priority: rng.randrange(6) for priority in CLASSES},
            "limit": rng.choice((1, 3, 500)),
            "weights": {"a": 2.0, "c": 0.5},
            "quotas": {
                flow: Quota(rng.choice((None, 0, 5)), rng.choice((None, 0, 100, 5_000)), idle=rng.random() < 0.3)
                for flow in self.FLOWS
                if rng.random() < 0.3
            },
        }

    def leave(self, decision: Decision) -> None:
        for priority, flow, run in decision.admitted:
            self.runs[priority, flow].remove(run)
            if not self.runs[priority, flow]:
                del self.runs[priority, flow]


def test_a_tenant_that_its_quota_stops_takes_no_place_in_the_order() -> None:
    """It neither earns credit nor pulls a newcomer down to where it stood."""
    lines: dict[Priority, dict[str, Line]] = {"batch": {"a": line("a", [1_000] * 50), "b": line("b", [1_000] * 50)}}
    books = decide(Books(), lines, window=WIDE, flight={}, limit=20).books
    stopped = {"a": Quota(runs=0)}
    books = decide(books, lines, window=WIDE, flight={}, limit=40, quotas=stopped).books
    found = decide(books, {"batch": {**lines["batch"], "new": line("new", [1_000] * 50)}}, window=WIDE, flight={},
                   limit=30)  # fmt: skip
    assert Counter(one.flow for one in found.admitted) == {"a": 10, "b": 10, "new": 10}


# -- the window -----------------------------------------------------------------------------------------------------


class Pool:
    """A pool that holds ``slots`` runs for ``seconds`` each; looked at ten times a second."""

    def __init__(self, slots: int, seconds: float, window: Window) -> None:
        self.slots, self.seconds, self.window = slots, seconds, window
        self.flight = 0.0
        self.rate = 0.0

    def look(self) -> float:
        """Let a tenth of a second pass with endless backlog; gives the wait in the queue, in seconds."""
        ended = min(self.flight, self.slots) / self.seconds * 0.1
        self.rate += 0.2 * (ended * 10 - self.rate)
        self.flight -= ended
        taken = min(self.flight, self.slots)
        self.window = adapt(self.window, Sight(round(taken), round(self.flight - taken), self.rate))
        self.flight = max(self.flight, float(self.window.size))
        return max(0.0, self.flight - self.slots) / (self.slots / self.seconds)


@pytest.mark.parametrize("slots", [16, 256, 5_000])
@pytest.mark.parametrize("seconds", [0.1, 1.0, 20.0])
def test_the_window_keeps_all_workers_busy_and_the_wait_below_two_seconds(slots: int, seconds: float) -> None:
    pool = Pool(slots, seconds, Window(min(slots, 256)))
    waits = [pool.look() for _ in range(1_200)][600:]
    assert pool.flight >= slots * 0.95
    assert max(waits) < 2 or max(waits) * slots / seconds <= LEAST + 3


def test_a_machine_that_is_slow_is_no_queue() -> None:
    """Workers with free slots that take 0.4 s to claim, because others use the machine: fewer runs in flight would not
    make that less, only the pool slower, and then fewer again. It went down to 30 of 256 and half of the throughput."""
    window, taken, coming, rate = Window(256), 0.0, [0.0] * 4, 0.0
    for look in range(1_200):
        ended = taken / 3.3 * 0.1
        rate += 0.2 * (ended * 10 - rate)
        taken += coming.pop(0) - ended
        later_s = 0.6 if look % 10 == 0 else None  # as the later pools tell once a second
        window = adapt(window, Sight(round(taken), round(sum(coming)), rate, later_s, holds=256))
        coming.append(max(0.0, window.size - taken - sum(coming)))
    assert window.size >= 64
    assert taken > 50, "it was 16 and falling"


def test_a_long_queue_of_a_later_pool_shrinks_the_window() -> None:
    window = adapt(Window(800), Sight(800, 0, 10.0, later_s=5 * AIM_S))
    assert window.size == 700
    assert adapt(Window(LEAST), Sight(8, 0, 10.0, later_s=9.0)).size == LEAST


def test_it_shrinks_no_faster_than_runs_end() -> None:
    """Runs that take minutes: a hundred looks before one ends do not close the pool."""
    window = Window(1_100, 1_000)
    for _ in range(100):
        window = adapt(window, Sight(taken=1_000, untaken=0, rate=5.0, later_s=4 * AIM_S))
    assert window.size == 875


def test_a_window_that_is_not_used_stays() -> None:
    assert adapt(Window(256), Sight(10, 0, 10.0, used=False)) == Window(256)


def test_without_any_worker_only_a_few_runs_enter() -> None:
    assert adapt(Window(256), Sight(0, 256, 0.0)).size == LEAST
