"""Metrics that need no downloads."""
