"""Shapes that cross a process or a disk boundary: chat messages, catalog (agents, models, workflows), runs."""
