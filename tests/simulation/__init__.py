"""Deterministic simulation: the real engine, runtime, scheduler and lease keeper in a world that a seed controls.

One seed is one schedule: who runs when, how long every call takes, what fails. The same seed always gives the same
schedule, so a violation found once is found again by its number.

What is real: ``agentq.engine``, ``agentq.runtime`` (runtime, scheduler, leases, perform) and ``agentq.store.memory``,
none of it copied. What is simulated: time, the event loop (one a process, ``loop``), the way to the database, the
broker, the model, the tools and the operating system (``world``).

What the seed may do, at every await of the outside (``faults``): delay and reorder; refuse a database call before it
is applied, or lose its answer after; kill the process (its coroutines vanish, its leases stay) before or after a call
is applied, in a call, or at a named crash point; freeze it past its lease and wake it up, with its monotonic clock
running (SIGSTOP) or standing still (a suspended machine); shift its wall clock; lose, repeat and delay hints; wipe the
broker; take the database away from all; fail models for now or for good; let tools time out before or after their
effect; cancel runs; drain workers. Workloads vary in runs, conversations, deadlines, budgets, parallel tools of all
effect classes, pools, schedulers, steps in flight, hints a message and going on in place.

What must hold is in ``invariants``. ``mutants`` are deliberate bugs which the simulation must catch: a test of the
test.

    python -m tests.simulation --count 100000            # explore, on all cores
    python -m tests.simulation --seed 17 --trace         # replay one schedule, say what happens in it
    python -m tests.simulation --mutants                 # which seed catches which deliberate bug

A schedule has two parts. While faults are on, anything may happen. Then they are off: workers and schedulers are back,
clocks are right, zombies wake up; from here every run must end within bounded time, and the books must balance.
"""
