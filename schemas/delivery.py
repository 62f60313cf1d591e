"""The delivery document: one message about one end to one receiver, kept until it has arrived or was given up.

A run or a batch that has ended makes one for everybody it has to tell (``agentq.engine.delivery``). Its id follows from
what it tells, so making it twice makes one.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from agentq.protocol import FollowUp, Webhook

DeliveryKind = Literal["webhook", "follow_up"]
DeliveryStatus = Literal["pending", "delivered", "dead"]


@with_config(ConfigDict(extra="forbid"))
class Failure(TypedDict):
    """Why the last try failed."""

    code: str
    message: str
    at: datetime


@with_config(ConfigDict(extra="forbid"))
class Delivery(TypedDict):
    """``_id`` is what the receiver knows the message by, over all tries. ``to`` says where it goes, ``lane`` whom it
    shares the way with. Of the run or batch ``subject`` it tells ``type`` (``run.succeeded``) and ``data``: ids and
    the status, never a text.

    A pending delivery is tried at ``not_before``; whoever tries moves that on and leaves a ``token``, so that one who
    dies meanwhile has lost nothing but time. ``attempts`` counts the tries begun since it was made or redriven.
    """

    _id: str
    kind: DeliveryKind
    subject: str
    tenant: str
    lane: str
    to: Webhook | FollowUp
    type: str
    data: dict[str, Any]
    status: DeliveryStatus
    attempts: int
    not_before: datetime
    token: str | None
    created_at: datetime
    error: Failure | None
    ended_at: datetime | None
    forget_at: NotRequired[datetime]  # a delivered one is removed then; a dead one stays until somebody decides


DELIVERY: TypeAdapter[Delivery] = TypeAdapter(Delivery)
