"""What an operator configures: models, agents, tools and workflows; and the bundle a run is pinned to.

Every model forbids unknown keys, so a mistyped key is refused at start (``config.catalog`` adds file and line).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentq.canonical import canonical_json
from agentq.protocol import Pool
from agentq.run import Registered

END = "end"  # the name of the node that ends a run


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BatchEndpoint(Spec):
    """A provider's endpoint for many calls at once that may take hours and cost a part of the price (OpenAI: Batch).

    Calls of batches that leave time for it are joined into jobs of it; see ``agentq.engine.joining``.
    """

    price: float = Field(0.5, ge=0, le=1, description="part of the model's prices that a joined call costs")
    most: int = Field(1_000, gt=0, le=50_000, description="calls a job has at most")
    gather_s: float = Field(30.0, ge=0, description="how long the first call of a job waits for others")
    turnaround_s: float = Field(3_600.0, gt=0, description="how long a job is taken to need until some have been seen")


class ModelSpec(Spec):
    """How to reach one model. Prices are US dollars per million tokens."""

    provider: Literal["openai", "anthropic"]
    model: str = Field(min_length=1, description="the provider's name of the model")
    base_url: str | None = Field(None, description="default: the provider's, or OPENAI_BASE_URL / ANTHROPIC_BASE_URL")
    native_tools: bool = Field(True, description="False: tools are described in the prompt and called in ReAct text")
    structured_output: bool = Field(True, description="False: JSON is asked for in the prompt only")
    context_tokens: int = Field(128_000, gt=0)
    max_output_tokens: int = Field(1024, gt=0)
    temperature: float | None = Field(None, ge=0, le=2, description="default: not sent, many current models refuse it")
    connect_timeout_s: float = Field(3.0, gt=0)
    read_timeout_s: float = Field(60.0, gt=0)
    input_usd_per_mtok: float = Field(0.0, ge=0)
    output_usd_per_mtok: float = Field(0.0, ge=0)
    batch_endpoint: BatchEndpoint | None = Field(None, description="default: calls to this model are always live")

    @model_validator(mode="after")
    def provider_has_the_endpoint(self) -> ModelSpec:
        if self.batch_endpoint is not None and self.provider != "openai":
            raise ValueError(f"batch_endpoint is not supported for the provider {self.provider}, only for openai")
        return self

    def cost_nano_usd(self, input_tokens: int, output_tokens: int) -> int:
        """Cost in nano-dollars (1e-9 USD), exact: one dollar per million tokens is 1000 nano-dollars a token."""
        return round(input_tokens * self.input_usd_per_mtok * 1000) + round(
            output_tokens * self.output_usd_per_mtok * 1000
        )


class AgentLimits(Spec):
    """Bounds of one visit to an agent node. Reaching one ends the visit with the best draft so far."""

    max_turns: int = Field(8, gt=0, description="model calls")
    max_tool_calls: int = Field(16, gt=0)
    max_tokens: int = Field(60_000, gt=0, description="input plus output tokens")
    max_cost_usd: float = Field(1.0, gt=0)
    max_wall_s: float = Field(300.0, gt=0)


class AgentSpec(Spec):
    """A specialist. ``description`` is what the router reads, ``instructions`` what the agent's model reads."""

    description: str = Field(min_length=1)
    instructions: str = Field(min_length=1)
    model: str
    tools: list[str] = []
    limits: AgentLimits = AgentLimits()


class ToolSpec(Spec):
    """A tool as derived from its Python function; ``parameters`` is a JSON Schema of type object.

    ``effect``: ``read`` changes nothing, ``write`` changes something that can be changed back, ``irreversible``
    cannot be undone. ``keyed``: the tool honours the idempotency key, so calling it again with the same key does
    nothing twice. A lost write without a key is never called again blindly.
    """

    description: str
    parameters: dict[str, Any]
    effect: Literal["read", "write", "irreversible"] = "read"
    keyed: bool = False
    timeout_s: float = Field(10.0, gt=0)
    max_result_bytes: int = Field(16_384, gt=0)

    @property
    def recovery(self) -> Literal["retry", "keyed", "unsafe"]:
        """What a lost lease on a call of this tool means: try again, again with the same key, or ask a person."""
        if self.effect == "read":
            return "retry"
        return "keyed" if self.keyed else "unsafe"


class RouteNode(Spec):
    """A model chooses one of ``agents``. One re-ask on an unusable choice, then ``default``."""

    type: Literal["route"]
    model: str
    agents: list[str] = Field(min_length=1)
    default: str
    instructions: str = ""
    next: str

    @model_validator(mode="after")
    def default_is_a_choice(self) -> RouteNode:
        if self.default not in self.agents:
            raise ValueError(f"default {self.default!r} is not one of agents {self.agents}")
        return self


class AgentNode(Spec):
    """An agent works with its tools until it has a draft. ``agent: $route`` takes the last route's choice."""

    type: Literal["agent"]
    agent: str
    next: str


class ToolNode(Spec):
    """Calls one tool. An argument value of the form ``{from: input}`` is read from the run, others are literal."""

    type: Literal["tool"]
    tool: str
    args: dict[str, Any] = {}
    next: str


class CriticNode(Spec):
    """A model accepts the draft, or names problems and sends it back to ``revise``, ``max_revisions`` times at most."""

    type: Literal["critic"]
    model: str
    instructions: str = ""
    max_revisions: int = Field(2, ge=0)
    revise: str
    next: str


NodeSpec = Annotated[RouteNode | AgentNode | ToolNode | CriticNode, Field(discriminator="type")]

NODE_POOL: dict[str, Pool] = {"route": "router", "agent": "specialist", "tool": "tools", "critic": "critic"}


class RunLimits(Spec):
    """Bounds of a whole run, over all its nodes."""

    max_steps: int = Field(60, gt=0)
    max_tokens: int = Field(200_000, gt=0)
    max_cost_usd: float = Field(2.0, gt=0)
    max_wall_s: float = Field(900.0, gt=0, description="from acceptance to the end; waiting counts")
    history_tokens: int = Field(2_000, ge=0, description="token window of earlier turns of the conversation")


class WorkflowSpec(Spec):
    """A directed graph of nodes. ``end`` ends the run with the current draft as its answer."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_.-]{0,63}$")
    description: str = ""
    start: str
    nodes: dict[str, NodeSpec] = Field(min_length=1)
    limits: RunLimits = RunLimits()

    @model_validator(mode="after")
    def edges_lead_somewhere(self) -> WorkflowSpec:
        known = {*self.nodes, END}
        if END in self.nodes:
            raise ValueError("'end' is the built-in last node; name yours otherwise")
        if self.start not in self.nodes:
            raise ValueError(f"start {self.start!r} is not one of the nodes {sorted(self.nodes)}")
        for name, node in self.nodes.items():
            for edge in ("next", "revise"):
                target = getattr(node, edge, None)
                if target is not None and target not in known:
                    raise ValueError(f"node {name!r}: {edge} {target!r} is not one of {sorted(known)}")
            if isinstance(node, CriticNode) and not isinstance(self.nodes.get(node.revise), AgentNode):
                raise ValueError(f"node {name!r}: revise {node.revise!r} is not an agent node")
        return self


class Bundle(Spec):
    """Everything a run's decisions depend on, pinned by ``hash`` for the life of the run. Holds no secret."""

    workflow: WorkflowSpec
    agents: dict[str, AgentSpec]
    models: dict[str, ModelSpec]
    tools: dict[str, ToolSpec]

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of this bundle."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()

    def registered(self) -> Registered:
        """What a client must know to give birth to a run of this bundle."""
        start = self.workflow.nodes[self.workflow.start]
        return {
            "name": self.workflow.name,
            "hash": self.hash,
            "start_pool": NODE_POOL[start.type],
            "start_recovery": self.tools[start.tool].recovery if isinstance(start, ToolNode) else "retry",
            "max_wall_s": self.workflow.limits.max_wall_s,
        }
