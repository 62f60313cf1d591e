"""Telling others that a run or a batch has ended: signed webhooks, follow-up tasks; at least once, by a stable id."""
