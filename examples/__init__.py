"""Real workloads, each runnable."""
