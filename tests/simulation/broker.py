"""The broker: it carries hints, and may lose, repeat, delay and reorder them as it likes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentq.protocol import POOLS, Hint, Pool

if TYPE_CHECKING:
    from tests.simulation.world import World


class Broker:
    """Messages of hints, by pool. At most once, in any order; what a dead worker had is gone."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.lost = False
        self._queues: dict[Pool, list[Hint]] = {pool: [] for pool in POOLS}
        self._generation = 0

    def take(self, hints: Sequence[tuple[Pool, Hint]], fault: str | None = None) -> None:
        world = self._world
        for pool, hint in hints:
            where = world.rng.choice(POOLS) if fault == "hint_astray" else pool
            self._queues[where].append(hint)
            if fault == "hint_twice":
                self._queues[where] += [hint] * world.rng.choice((1, 4))
        delay = world.slow(400_000) if fault == "hint_late" else world.quick()
        for pool in {pool: None for pool, _ in hints} if fault != "hint_astray" else dict.fromkeys(POOLS):
            world.clock.after(delay, None, self._send, pool, self._generation, 200)
            if fault == "hint_twice":
                world.clock.after(world.slow(100_000), None, self._send, pool, self._generation, 200)

    def wipe(self) -> None:
        self._generation += 1
        self.lost = True
        for queue in self._queues.values():
            queue.clear()

    def _send(self, pool: Pool, generation: int, patience: int) -> None:
        """Hand the queue's hints to workers, so many a message."""
        world, queue = self._world, self._queues[pool]
        if generation != self._generation or not queue:
            return
        consumers = [worker for worker in world.workers if worker.process.alive and pool in worker.pools]
        if not consumers:
            if patience:
                world.clock.after(1_000, None, self._send, pool, generation, patience - 1)
            return
        while queue:
            size = world.batch or world.rng.randint(1, 50)
            message, queue[:] = queue[:size], queue[size:]
            world.rng.shuffle(message)
            worker = world.rng.choice(consumers)
            world.note(worker.process, f"gets {' '.join(f'{h.run_id}:{h.step_id}/{h.attempt}' for h in message)}")
            world.clock.after(0, worker.process, worker.deliver, pool, message)
