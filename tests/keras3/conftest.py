"""Keras 3: these tests run in a process of their own."""

import keras_choice
from occurrences import pytest_terminal_summary  # noqa: F401

keras_choice.choose("keras")
