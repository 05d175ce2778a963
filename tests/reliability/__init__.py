"""Tests of what happens when a process dies, the power fails, a disk is full, or builders meet."""

import pytest

pytest.register_assert_rewrite("tests.reliability.checks")
