"""Several workers for minutes, faults all the while; afterwards everything is there, once, and nothing is stuck.

`python -m tests.soak --help` for runs by hand, `make soak MINUTES=10` for a long one.
"""

import pytest

# Asserts outside of test modules say what they saw, too.
pytest.register_assert_rewrite("tests.soak.checks")
