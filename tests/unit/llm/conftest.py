from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentq.testing import no_real_models


@pytest.fixture(autouse=True)
def _no_real_models() -> Iterator[None]:
    with no_real_models():
        yield
