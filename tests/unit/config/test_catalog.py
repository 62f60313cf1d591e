"""The catalog: what fits together becomes bundles, what does not is told with file, line, reason and mend."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentq.errors import ConfigError
from agentq.tools import tool
from config.catalog import DEFAULT_DIRECTORY, catalog_directories, load_catalog
from config.settings import load_settings
from schemas.catalog import AgentNode, Bundle, CriticNode, RouteNode

MODELS = """\
models:
  small:
    provider: openai
    model: gpt-x
  large:
    provider: anthropic
    model: claude-x
  unused:
    provider: openai
    model: gpt-y
"""
AGENTS = """\
agents:
  orders:
    description: Knows orders.
    instructions: Look the order up.
    model: small
    tools: [find_order]
  refunds:
    description: Pays money back.
    instructions: Be careful.
    model: large
    tools:
      - find_order
      - refund
    limits:
      max_turns: 3
  idle:
    description: Not used.
    instructions: None.
    model: unused
"""
TOOLS = """\
modules:
  - desk_tools
limits:
  refund:
    timeout_s: 2
"""
WORKFLOW = """\
name: default
start: route
nodes:
  route:
    type: route
    model: small
    agents: [orders, refunds]
    default: orders
    next: work
  work:
    type: agent
    agent: $route
    next: review
  review:
    type: critic
    model: large
    revise: work
    next: end
"""
TOOL_NODE = """\
name: lookup
start: look
nodes:
  look:
    type: tool
    tool: find_order
    args:
      order: {from: input}
      deep: true
    next: end
"""


@tool()
def find_order(order: str, deep: bool = False) -> str:
    """Find an order."""
    return order


@tool(effect="irreversible", timeout_s=9)
def refund(order: str, cents: int) -> str:
    """Pay back."""
    return order


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound catalog, named by relative paths as a person would."""
    module = ModuleType("desk_tools")
    module.__dict__.update(find_order=find_order, refund=refund)
    monkeypatch.setitem(sys.modules, "desk_tools", module)
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "desk",
        {
            "models.yaml": MODELS,
            "agents.yaml": AGENTS,
            "tools.yaml": TOOLS,
            "workflows/default.yaml": WORKFLOW,
            "workflows/lookup.yaml": TOOL_NODE,
        },
    )
    return tmp_path / "desk"


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def faults(*directories: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_catalog(directories)
    found: list[str] = caught.value.details["faults"]
    assert str(caught.value).startswith(found[0])
    return found


# -- what is sound --------------------------------------------------------------------------------------------------


def test_the_default_catalog_is_sound() -> None:
    """Route to the assistant, let a critic revise twice at most; no tools; models of both providers and a ReAct one."""
    catalog = load_catalog([DEFAULT_DIRECTORY])
    bundle = catalog.bundles["default"]
    assert set(bundle.agents) == {"assistant"}
    assert bundle.tools == {}
    nodes = list(bundle.workflow.nodes.values())
    assert [type(node) for node in nodes] == [RouteNode, AgentNode, CriticNode]
    assert isinstance(nodes[2], CriticNode)
    assert nodes[2].max_revisions == 2
    assert all(model.input_usd_per_mtok > 0 and model.output_usd_per_mtok > 0 for model in bundle.models.values())
    text = (DEFAULT_DIRECTORY / "models.yaml").read_text()
    assert "provider: anthropic" in text
    assert "native_tools: false" in text


def test_a_bundle_holds_what_its_workflow_can_reach_and_nothing_else(desk: Path) -> None:
    catalog = load_catalog([desk])
    assert set(catalog.bundles) == {"default", "lookup"}
    default, lookup = catalog.bundles["default"], catalog.bundles["lookup"]
    assert (set(default.agents), set(default.models)) == ({"orders", "refunds"}, {"small", "large"})
    assert set(default.tools) == {"find_order", "refund"}
    assert (lookup.agents, lookup.models, set(lookup.tools)) == ({}, {}, {"find_order"})
    assert set(catalog.toolbox.specs) == {"find_order", "refund"}


def test_the_operators_limits_hold_for_a_tool(desk: Path) -> None:
    spec = load_catalog([desk]).bundles["default"].tools["refund"]
    assert (spec.timeout_s, spec.max_result_bytes, spec.effect) == (2, 16_384, "irreversible")


def test_the_same_files_give_the_same_hash_and_any_change_another(desk: Path) -> None:
    """A run is pinned by it: order and comments do not matter, content does."""
    before = load_catalog([desk]).bundles["default"].hash
    (desk / "workflows" / "default.yaml").write_text("# comment\n" + WORKFLOW)
    assert load_catalog([desk]).bundles["default"].hash == before
    (desk / "agents.yaml").write_text(AGENTS.replace("Be careful.", "Be very careful."))
    assert load_catalog([desk]).bundles["default"].hash != before


def test_a_bundle_survives_its_stored_form(desk: Path) -> None:
    bundle = load_catalog([desk]).bundles["default"]
    assert Bundle.model_validate_json(bundle.model_dump_json()) == bundle


def test_later_directories_override_by_name(desk: Path, tmp_path: Path) -> None:
    overlay = write(
        tmp_path / "overlay",
        {
            "agents.yaml": AGENTS.partition("  refunds:")[0].replace("Look the order up.", "Other."),
            "workflows/mine.yaml": WORKFLOW.replace("max_revisions: 2", ""),
        },
    )
    bundle = load_catalog([desk, overlay]).bundles["default"]
    assert bundle.agents["orders"].instructions == "Other."
    assert bundle.agents["refunds"].instructions == "Be careful."


def test_an_application_comes_on_top_of_the_default_catalog(tmp_path: Path) -> None:
    settings = load_settings(environ={}, cwd=tmp_path, app_dir="app")
    assert catalog_directories(settings) == [DEFAULT_DIRECTORY, tmp_path / "app"]
    assert catalog_directories(load_settings(environ={}, cwd=tmp_path)) == [DEFAULT_DIRECTORY]


def test_loading_starts_no_thread(desk: Path) -> None:
    before = threading.active_count()
    load_catalog([desk])
    assert threading.active_count() == before


# -- what is wrong --------------------------------------------------------------------------------------------------

M, A, T, W, L = (
    f"desk/{name}"
    for name in ("models.yaml", "agents.yaml", "tools.yaml", "workflows/default.yaml", "workflows/lookup.yaml")
)


@pytest.mark.parametrize(
    ("file", "old", "new", "line", "fault"),
    [
        # keys and values
        (M, "    model: gpt-x\n", "", 2, "models.small has no 'model'. model: the provider's name of the model."),
        (M, "model: claude-x", "modell: claude-x", 5, "models.large has no 'model'."),
        (
            M,
            "model: gpt-y",
            "model: gpt-y\n    temprature: 1",
            11,
            "models.unused has the unknown key 'temprature'. Did you mean 'temperature'?",
        ),
        (
            M,
            "model: gpt-y",
            "model: gpt-y\n    temperature: 9",
            11,
            "models.unused.temperature should be less than or equal to 2, got 9",
        ),
        (
            M,
            "provider: anthropic",
            "provider: antropic",
            6,
            "models.large.provider should be 'openai' or 'anthropic', got 'antropic'",
        ),
        (
            M,
            "  small:\n    provider: openai\n    model: gpt-x",
            "  small:",
            2,
            "models.small should be 'key: value' lines, got None",
        ),
        (M, "models:", "model:", 1, "there is no section 'model'. Did you mean 'models'?"),
        (M, "  small:", "  'the small':", 2, "'the small' is no usable name."),
        (M, MODELS, "models: [a]", 1, "models should be 'name: ...' entries"),
        (M, MODELS, "- a", 1, "it should begin with 'models:'"),
        (M, "  large:", "  small:", 5, "the key 'small' is already on line 2"),
        (
            A,
            "max_turns: 3",
            "max_turn: 3",
            15,
            "agents.refunds.limits has the unknown key 'max_turn'. Did you mean 'max_turns'?",
        ),
        (
            A,
            "max_turns: 3",
            "max_turns: 0",
            15,
            "agents.refunds.limits.max_turns should be greater than 0, got 0. max_turns: model calls.",
        ),
        (A, "      - refund\n", "      - 7\n", 13, "agents.refunds.tools[1] should be a valid string, got 7"),
        (
            T,
            "  - desk_tools",
            "  - desk tools",
            2,
            "'desk tools' is no Python module name. Write it like package.module.",
        ),
        (T, "modules:\n  - desk_tools", "modules: desk_tools", 1, "modules should be a list."),
        (
            T,
            "timeout_s: 2",
            "timeout_s: -2",
            5,
            "limits.refund.timeout_s should be greater than 0, got -2. timeout_s: seconds a call may take",
        ),
        (W, "name: default", "name: Default", 1, "name should match pattern"),
        (W, "    default: orders\n", "", 4, "nodes.route has no 'default'."),
        (
            W,
            "default: orders",
            "default: ordres",
            8,
            "nodes.route default 'ordres' is not one of agents ['orders', 'refunds'].",
        ),
        (
            W,
            "type: critic",
            "type: critc",
            15,
            "nodes.review.type is no known type, got 'critc'. Did you mean 'critic'?",
        ),
        (W, "    type: critic\n", "", 14, "nodes.review has no 'type'. Add 'type: ...'."),
        (
            W,
            "revise: work",
            "revise: work\n    max_revision: 1",
            18,
            "nodes.review has the unknown key 'max_revision'. Did you mean 'max_revisions'?",
        ),
        (W, "agents: [orders, refunds]", "agents: []", 7, "nodes.route.agents"),
        (L, "tool: find_order", "tol: find_order", 4, "nodes.look has no 'tool'."),
        (
            L,
            "    tool: find_order\n",
            "    tool: find_order\n    retry: 1\n",
            7,
            "nodes.look has the unknown key 'retry'. Known keys: args, next, tool, type.",
        ),
        (W, WORKFLOW, "", 1, "desk/workflows/default.yaml has no 'name'."),
        # edges
        (W, "next: work", "next: wrok", 9, "nodes.route.next 'wrok' is no node. Did you mean 'work'?"),
        (W, "revise: work", "revise: wrk", 17, "nodes.review.revise 'wrk' is no node. Did you mean 'work'?"),
        (W, "revise: work", "revise: route", 17, "nodes.review.revise 'route' is no agent node."),
        (W, "start: route", "start: begin", 2, "start 'begin' is no node. Known nodes: review, route, work."),
        (
            L,
            "  look:\n",
            "  end:\n    type: agent\n    agent: orders\n    next: end\n  look:\n",
            4,
            "'end' is the built-in last node. Name yours otherwise.",
        ),
        # references
        (A, "model: large", "model: lage", 10, "agent 'refunds': there is no model 'lage'. Did you mean 'large'?"),
        (
            A,
            "      - refund\n",
            "      - refnd\n",
            13,
            "agent 'refunds': there is no tool 'refnd'. Did you mean 'refund'?",
        ),
        (T, "  refund:", "  refunds:", 4, "limits: there is no tool 'refunds'. Did you mean 'refund'?"),
        (
            W,
            "agents: [orders, refunds]",
            "agents: [orders,\n      refnds]",
            8,
            "node 'route': there is no agent 'refnds'. Did you mean 'refunds'?",
        ),
        (W, "agent: $route", "agent: order", 12, "node 'work': there is no agent 'order'. Did you mean 'orders'?"),
        (
            W,
            "    model: small",
            "    model: tiny",
            6,
            "node 'route': there is no model 'tiny'. Known models: large, small, unused.",
        ),
        (W, "    model: large", "    model: tiny", 16, "node 'review': there is no model 'tiny'."),
        (
            L,
            "tool: find_order",
            "tool: find_orders",
            6,
            "node 'look': there is no tool 'find_orders'. Did you mean 'find_order'?",
        ),
        (
            L,
            "deep: true",
            "depp: true",
            9,
            "node 'look': tool 'find_order' has no parameter 'depp'. Did you mean 'deep'?",
        ),
        (
            L,
            "      order: {from: input}\n",
            "",
            7,
            "node 'look': tool 'find_order' needs 'order'. Add 'order' to args.",
        ),
        (
            L,
            "from: input",
            "from: inptu",
            8,
            "node 'look': 'order' is read from unknown 'inptu'. Did you mean 'input'?",
        ),
        # the graph
        (W, "start: route", "start: work", 4, "node 'route' is never reached."),
        (L, "next: end", "next: look", 10, "the nodes look -> look go round for ever."),
        (
            W,
            "    revise: work\n    next: end",
            "    revise: work\n    next: route",
            18,
            "the nodes route -> work -> review -> route go round for ever.",
        ),
    ],
)
def test_each_fault_is_told_with_its_line_and_mend(
    desk: Path, file: str, old: str, new: str, line: int, fault: str
) -> None:
    path = desk.parent / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    found = faults(Path("desk"))
    assert any(each.startswith(f"{file}:{line}: {fault}") for each in found), found
    assert all(". " in each for each in found), "every fault says how to mend it"


def test_the_routed_agent_needs_a_route_on_every_way_to_it(desk: Path) -> None:
    (desk / "workflows" / "default.yaml").write_text(WORKFLOW.replace("start: route", "start: work"))
    assert any(
        fault.startswith(f"{W}:12: node 'work': agent $route is reached without a route node before it")
        for fault in faults(Path("desk"))
    )


def test_all_faults_of_all_files_are_told_together(desk: Path) -> None:
    """One run of the command shows everything there is to mend."""
    (desk / "models.yaml").write_text(MODELS.replace("provider: openai", "provider: open", 1))
    (desk / "agents.yaml").write_text(AGENTS.replace("model: large", "model: lage"))
    (desk / "workflows" / "default.yaml").write_text(
        WORKFLOW.replace("next: work", "next: x").replace("next: end", "next: y")
    )
    (desk / "workflows" / "lookup.yaml").write_text("a: [")
    found = faults(Path("desk"))
    assert [fault.split(": ")[0] for fault in found] == [f"{M}:3", f"{W}:9", f"{W}:18", f"{L}:1", f"{A}:10"]
    with pytest.raises(ConfigError, match=r"\(4 more faults\.\)"):
        load_catalog([desk])


def test_a_faulty_entry_is_not_also_called_missing(desk: Path) -> None:
    """One mistake, one message."""
    (desk / "models.yaml").write_text(MODELS.replace("model: gpt-x", "model: ''"))
    assert len(faults(Path("desk"))) == 1


def test_a_tool_module_that_does_not_load_is_told_with_its_line(desk: Path) -> None:
    (desk / "tools.yaml").write_text("modules:\n  - desk_tools\n  - no_such_tools\n")
    found = faults(Path("desk"))
    assert len(found) == 1
    assert found[0].startswith(f"{T}:3: Module 'no_such_tools' cannot be imported")


def test_two_workflows_of_one_name_are_refused(desk: Path) -> None:
    (desk / "workflows" / "lookup.yaml").write_text(TOOL_NODE.replace("lookup", "default"))
    assert faults(Path("desk")) == [f"{L}:1: workflow 'default' is also in {W}:1. Rename one."]


def test_files_that_would_be_overlooked_are_refused(desk: Path, tmp_path: Path) -> None:
    (desk / "agents.yml").write_text(AGENTS)
    (desk / "workflows" / "new.yml").write_text(WORKFLOW)
    (desk / "other.yml").write_text("anything: goes")
    assert faults(Path("desk")) == [
        "desk/agents.yml: it is not read. Rename it to agents.yaml.",
        "desk/workflows/new.yml: it is not read. Rename it to new.yaml.",
    ]


def test_a_directory_that_is_no_catalog_is_refused(desk: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert faults(desk, Path("none"))[0].startswith("none: there is no such directory")
    assert faults(desk, Path("empty"))[0].startswith("empty: it holds none of models.yaml")
    write(tmp_path / "bare", {"models.yaml": ""})
    assert faults(Path("bare"))[0].startswith("bare: there is no workflow")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
@given(data=st.data())
def test_no_text_makes_the_load_break(desk: Path, data: st.DataObject) -> None:
    """Lines removed, doubled or replaced anywhere: the catalog loads, or its faults have places. Never a traceback."""
    name, text = data.draw(
        st.sampled_from(
            [
                ("models.yaml", MODELS),
                ("agents.yaml", AGENTS),
                ("tools.yaml", TOOLS),
                ("workflows/default.yaml", WORKFLOW),
            ]
        )
    )
    lines = text.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(lines) - 1))
        change: Callable[[str], list[str]] = data.draw(
            st.sampled_from(
                [
                    lambda line: [],
                    lambda line: [line, line],
                    lambda line: [line.split(":")[0] + ": [1, {a: b}]"],
                    lambda line: [line.split(":")[0] + ":"],
                    lambda line: ["  " + line],
                    lambda line: [line.lstrip()],
                    lambda line: [line.split(":")[0] + ": end"],
                ]
            )
        )
        lines[index : index + 1] = change(lines[index])
        if not lines:
            break
    path = desk / name
    path.write_text("\n".join(lines))
    try:
        load_catalog([Path("desk")])
    except ConfigError as error:
        found: list[Any] = error.details["faults"]
        assert all(fault.startswith("desk") for fault in found), found
    finally:
        path.write_text(text)
