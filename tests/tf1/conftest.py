"""Tests of TensorFlow 1 graphs."""

from occurrences import pytest_terminal_summary  # noqa: F401
