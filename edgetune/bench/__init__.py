"""Measurements: accuracy, latency, start, memory; and what this machine can do."""
