"""The workload's one tool: a plain function, as most tools are, so the hop into a thread and back is measured, too."""

from __future__ import annotations

from agentq.tools import tool


@tool(effect="read", timeout_s=5)
def order_status(order_id: str) -> dict[str, str]:
    """Look up one order: where the parcel is and when it arrives.

    Args:
        order_id: the order number, for example A-10017.
    """
    return {"order_id": order_id, "status": "shipped", "carrier": "DHL", "expected": "2026-11-24"}
