"""Tools whose effects can be counted: the bank in the test's process hears of every call, and pays once a key."""

from __future__ import annotations

import json
import os
import signal
import urllib.request

from agentq.tools import ToolContext, tool

# Not through a proxy that the environment may name.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _tell_bank(name: str, account: str, context: ToolContext) -> dict[str, str]:
    body = json.dumps({"tool": name, "account": account, "key": context.idempotency_key}).encode()
    wanted = urllib.request.Request(os.environ["FAULT_BANK_URL"], body, {"Content-Type": "application/json"})
    with _DIRECT.open(wanted, timeout=10) as answer:
        told: dict[str, str] = json.load(answer)
    return told


@tool(effect="read")
def look_up(account: str, context: ToolContext) -> dict[str, str]:
    """Look up an account."""
    return _tell_bank("look_up", account, context)


@tool(effect="write", keyed=True)
def pay(account: str, context: ToolContext) -> str:
    """Pay an account, once a key."""
    _tell_bank("pay", account, context)
    return f"paid {account}"


@tool(effect="irreversible")
def wire(account: str, context: ToolContext) -> str:
    """Wire money, as often as it is called."""
    _tell_bank("wire", account, context)
    return f"wired {account}"


@tool(effect="write", keyed=True)
def die(account: str, context: ToolContext) -> str:
    """Kill the process it runs in."""
    _tell_bank("die", account, context)
    os.kill(os.getpid(), signal.SIGKILL)
    return f"survived {account}"
