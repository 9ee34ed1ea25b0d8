"""Differential privacy: what is promised, what it costs, and the mechanisms that keep it."""
