"""Tools: typed Python functions that agents may call, declared with ``@tool`` and performed by a ``Toolbox``."""

from agentq.errors import ToolError
from agentq.tools.declare import ToolContext, tool
from agentq.tools.result import ToolResult
from agentq.tools.toolbox import Toolbox, load_toolbox

__all__ = ["ToolContext", "ToolError", "ToolResult", "Toolbox", "load_toolbox", "tool"]
