"""The command line: ``agentq`` or ``python -m agentq.cli``."""
