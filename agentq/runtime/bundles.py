"""The versions of workflows that a process has met."""

from __future__ import annotations

from agentq.errors import AgentqError
from agentq.store.api import Store
from schemas.catalog import Bundle
from schemas.run import RunDoc


class Bundles:
    """A version never changes, so each is read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, Bundle] = {}

    async def of(self, run: RunDoc) -> Bundle:
        """The version to which a run is pinned. Raises as ``get``."""
        return await self.get(run["workflow"]["hash"])

    async def get(self, name: str) -> Bundle:
        """The version with this hash. Raises ``AgentqError`` (``unknown_workflow_version``) where there is none."""
        if name not in self._known:
            found = await self._store.bundle(name)
            if found is None:
                raise AgentqError(
                    "The run's workflow version is not registered.", code="unknown_workflow_version",
                    hint="Start a worker that has it in its catalog.",
                )  # fmt: skip
            self._known[name] = found
        return self._known[name]
