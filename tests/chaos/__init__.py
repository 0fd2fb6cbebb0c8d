"""Faults between the worker and everything it needs, and what must hold all the same."""

import pytest

# Asserts outside of test modules say what they saw, too.
pytest.register_assert_rewrite("tests.chaos.oracles")
