"""Completions and forecasts drawn from a policy."""
