"""Which tests share a process under pytest-xdist: ``pytest -n 2 -p tests.acceptance.scheduling``.

The files of this folder share one running stack, so they share a process; any other file stays in one process, with
its fixtures. (pytest-xdist's own ``--dist loadgroup`` does nothing under pytest 9.2: it marks groups in an attribute
that pytest no longer reads.)
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

FOLDER = "tests/acceptance/"


class OneStack(LoadFileScheduling):
    """Like ``--dist loadfile``, with this folder as one file."""

    def _split_scope(self, nodeid: str) -> str:
        return FOLDER if nodeid.startswith(FOLDER) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneStack:
    """pytest-xdist's hook."""
    return OneStack(config, log)
