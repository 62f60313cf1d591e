"""The documentation: every link between its pages, and from them into the checkout, leads somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "bench", "examples")
PAGES = sorted([*CHECKOUT.glob("*.md"), *(page for folder in FOLDERS for page in (CHECKOUT / folder).rglob("*.md"))])
TARGETS = {"setup", "demo", "run", "test", "test-all", "fault", "lint", "types", "bench", "docs", "check"}
_LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing


def test_every_make_target_that_the_readme_names_exists() -> None:
    """And ``make help`` lists each with what it does."""
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout
    named = set(re.findall(r"`?make ([a-z-]+)", (CHECKOUT / "README.md").read_text(encoding="utf-8")))
    assert named, "the README says how to start"
    for target in named | TARGETS:
        assert re.search(rf"^  make {target} +\S", listed, re.MULTILINE), f"make {target}"
