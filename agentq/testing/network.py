"""The kill switch for real model calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agentq.llm.endpoints import Endpoints


@contextmanager
def no_real_models() -> Iterator[None]:
    """While it is open, no transport of ours in this process calls any host but a loopback one.

    A refused call raises ``ProviderError`` with code ``real_model_refused`` (not retryable) and sends nothing. It holds
    for transports that exist already and in all threads. Child processes are not covered: give those no key.

        @pytest.fixture(autouse=True)
        def _no_real_models():
            with no_real_models():
                yield
    """
    before = Endpoints.only_loopback
    Endpoints.only_loopback = True
    try:
        yield
    finally:
        Endpoints.only_loopback = before
