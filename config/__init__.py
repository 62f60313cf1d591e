"""What an operator sets: one tree of settings, and the catalog of models, agents, tools and workflows."""
