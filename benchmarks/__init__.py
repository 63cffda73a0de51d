"""Benchmarks: what luacell costs beside the floors it stands on, measured in the same run."""
