from __future__ import annotations

import math

import pytest

from agentq.tools import ToolContext


@pytest.fixture
def context() -> ToolContext:
    return ToolContext(
        run_id="r1",
        step_id="s1",
        attempt=1,
        tenant="default",
        user=None,
        conversation=None,
        agent="helper",
        idempotency_key="r1:s1",
        deadline=math.inf,
    )
