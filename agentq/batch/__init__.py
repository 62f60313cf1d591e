"""Batches in and out: files of requests, the lines they become, the results that come back."""
