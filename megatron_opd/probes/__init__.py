"""Questions to student and teacher before, or between, runs: see `tools/probe.py`."""
