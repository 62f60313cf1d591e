"""agentq: a durable message queue for LLM agents. Other back ends import ``agentq.client``."""

__version__ = "0.1.0"
