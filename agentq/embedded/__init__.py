"""The embedded default: a real Redis, a real MongoDB and the whole system on one machine, under one supervisor."""
