"""The mark of tests that need the real vLLM."""

import importlib.util

import pytest

NEEDS_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: make vllm"
)
