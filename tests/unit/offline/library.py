"""A desk that is not the shop's: a lending library. The stand-in must serve it from its prompts alone."""

from __future__ import annotations

import json
from typing import Any

from agentq.engine.prompts import VERDICT_SCHEMA, agent_messages, critic_messages, route_schema
from agentq.offline.brain import answer
from agentq.offline.prompt import Prompt, Reply
from schemas.catalog import AgentSpec, CriticNode, ModelSpec
from schemas.chat import Message, ToolCall, ToolSchema

ROUTER = """You route each request to the one specialist who can serve it best.

Specialists:
- loans: Borrowed books: loans, due dates, renewing (extending), overdue books, fines (fees to pay).
- catalogue: Finding books: authors, titles, shelves, new books, recommendations by genre.
- rooms: Reading rooms and seats: booking a room, group rooms, quiet places, wifi and printers.
- desk: Opening hours, membership cards, and everything else.

Answer with JSON: {"route": "<name of the specialist>", "reason": "<one sentence>"}."""
OPTIONS = ["loans", "catalogue", "rooms", "desk"]

LOAN = {"type": "string", "pattern": r"^LN-[0-9]{3}$", "description": "The loan number, for example LN-104."}
WORDS = {"type": "string", "minLength": 3}


def tool(name: str, description: str, properties: dict[str, Any], required: list[str] | None = None) -> ToolSchema:
    return {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": properties, "required": required or list(properties)},
    }


TOOLS: list[ToolSchema] = [
    tool(
        "search_handbook",
        "Search the library's handbook for rules, opening hours and how things work.",
        {"query": WORDS},
    ),
    tool("get_loan", "Look up one loan: which book, when it is due, whether it is overdue.", {"loan_id": LOAN}),
    tool(
        "renew_loan",
        "Renew (extend, prolong) a loan by some weeks. Call get_loan first.",
        {"loan_id": LOAN, "weeks": {"type": "integer"}},
        ["loan_id"],
    ),
    tool(
        "notify_librarian",
        "Leave a message for a librarian (person, human), or when another result says that a librarian must decide.",
        {
            "subject": {**WORDS, "maxLength": 80},
            "message": WORDS,
            "urgency": {
                "type": "string",
                "enum": ["low", "high"],
                "description": "high: somebody is angry or asks for a person; low: everything else.",
            },
        },
    ),
]
AGENT = AgentSpec(
    description="loans", instructions="You work at a library. You help readers with loans and books.", model="m",
    tools=[schema["name"] for schema in TOOLS],
)  # fmt: skip
NATIVE = ModelSpec(provider="openai", model="m")
TEXT_ONLY = ModelSpec(provider="openai", model="m", native_tools=False, structured_output=False)

HANDBOOK = {
    "articles": [
        {
            "id": "HB-7",
            "title": "Fines for overdue books",
            "text": "An overdue book costs 0.20 USD a day. The fine is at most 8 USD.\n\nFines are paid at the desk.",
        },
        {"id": "HB-2", "title": "Opening hours", "text": "The library is open from 10 to 20. It is closed on Mondays."},
    ]
}


def route(text: str, *earlier: str) -> str:
    """The option the router chooses."""
    said: list[Message] = [{"role": "user", "content": line} for line in (*earlier, text)]
    reply = answer(Prompt("m", ROUTER, tuple(said), schema=route_schema(OPTIONS)))
    chosen = json.loads(reply.text)
    assert chosen["reason"]
    return str(chosen["route"])


class Talk:
    """An agent's visit: the tools' results are given by hand, by name and arguments."""

    def __init__(self, request: str, *history: Message, model: ModelSpec = NATIVE) -> None:
        self.request, self.history, self.model = request, list(history), model
        self.transcript: list[Message] = []

    def turn(self) -> Reply:
        messages = agent_messages(AGENT, self.model, TOOLS, self.request, self.history, self.transcript)
        system, *others = messages
        tools = tuple(TOOLS) if self.model.native_tools else ()
        return answer(Prompt("m", system["content"], tuple(others), tools))

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """The calls of the next turn; they wait for their results."""
        reply = self.turn()
        self.transcript.append({"role": "assistant", "content": reply.text, "tool_calls": list(reply.tool_calls)})
        self._open: list[ToolCall] = list(reply.tool_calls)
        return [(call["name"], call["arguments"]) for call in reply.tool_calls if isinstance(call["arguments"], dict)]

    def results(self, *contents: object) -> None:
        """What the tools say to the open calls, in order; a text is a refusal, anything else is sent as JSON."""
        for call, content in zip(self._open, contents, strict=True):
            text = content if isinstance(content, str) else json.dumps(content)
            self.transcript.append({"role": "tool", "content": text, "tool_call_id": call["id"], "name": call["name"]})

    def answer(self) -> str:
        reply = self.turn()
        assert not reply.tool_calls
        return reply.text


def verdict(request: str, transcript: list[Message], draft: str) -> list[str]:
    """The critic's problems, empty if it accepts."""
    system, user = critic_messages(
        CriticNode(type="critic", model="m", revise="a", next="end"), request, transcript, draft
    )
    reply = json.loads(answer(Prompt("m", system["content"], (user,), schema=VERDICT_SCHEMA)).text)
    assert (reply["verdict"] == "accept") == (not reply["problems"])
    return [str(problem) for problem in reply["problems"]]
