"""Faults in what an operator wrote: each names its place, the reason and the mend; all of a load are told together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agentq.errors import ConfigError

_FEW = 12


@dataclass(frozen=True, slots=True)
class Fault:
    """``where`` is ``file:line``, or the name of an environment variable or option. No part holds a secret."""

    where: str
    reason: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}. {self.mend}".strip()


class Faulty(Exception):
    """Carries the faults of one file up to where those of all files are gathered."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(faults[0])
        self.faults = faults


def refuse(faults: Sequence[Fault]) -> None:
    """Raise one ``ConfigError`` for all faults, if there are any.

    Its sentence is the first fault; ``details["faults"]`` holds all of them as sentences, in the order they were found.
    """
    if not faults:
        return
    first, more = faults[0], len(faults) - 1
    others = f" ({more} more fault{'s' if more > 1 else ''}.)" if more else ""
    raise ConfigError(
        f"{first.where}: {first.reason}.", hint=f"{first.mend}{others}".strip(), faults=[str(fault) for fault in faults]
    )


def suggest(name: str, known: Iterable[str], *, what: str = "names") -> str:
    """The mend for an unknown name: the one it was probably meant to be, else the few there are, else the closest."""
    choices = sorted(known)
    if not choices:
        return f"There are no {what} yet."
    likely = difflib.get_close_matches(name, choices, n=1)
    if likely:
        return f"Did you mean '{likely[0]}'?"
    if len(choices) <= _FEW:
        return f"Known {what}: {', '.join(choices)}."
    return f"The closest known one is '{difflib.get_close_matches(name, choices, n=1, cutoff=0)[0]}'."
