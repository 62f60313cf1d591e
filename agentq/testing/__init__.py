"""For tests of workflows, agents and applications that use agentq: a scripted model, and a switch against real ones.

    from agentq.testing import Held, ScriptedLlm, calls_tool, no_real_models, says

    llm = ScriptedLlm([calls_tool("look_up_order", {"order": "A-17"}), says("It left on Monday.")])
    ...                                   # run the code under test with llm in place of agentq.llm.http.HttpLlm
    assert llm.calls[1].messages[-1]["role"] == "tool"
    llm.assert_complete()

Nothing in here needs a network, a database or a clock.
"""

from agentq.testing.model import Answer, Held, Script, ScriptedLlm, calls_tool, says
from agentq.testing.network import no_real_models

__all__ = ["Answer", "Held", "Script", "ScriptedLlm", "calls_tool", "no_real_models", "says"]
