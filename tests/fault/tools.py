"""Tools whose effects can be counted: every call is recorded in MongoDB, a payment once a key."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from pymongo import MongoClient
from pymongo.collection import Collection

from agentq.tools import ToolContext, tool


@lru_cache
def _collection(_pid: int, name: str) -> Collection[dict[str, Any]]:
    client: MongoClient[dict[str, Any]] = MongoClient(os.environ["AGENTQ_MONGO_URL"], w="majority")
    return client["fault_effects"][name]


@tool(effect="read")
def look_up(account: str, context: ToolContext) -> dict[str, str]:
    """Look up an account."""
    _collection(os.getpid(), "calls").insert_one({"key": context.idempotency_key, "tool": "look_up"})
    return {"account": account, "balance": "12"}


@tool(effect="write", keyed=True)
def pay(account: str, context: ToolContext) -> str:
    """Pay an account, once a key."""
    _collection(os.getpid(), "calls").insert_one({"key": context.idempotency_key, "tool": "pay"})
    _collection(os.getpid(), "payments").update_one(
        {"_id": context.idempotency_key}, {"$setOnInsert": {"account": account}}, upsert=True
    )
    return f"paid {account}"
