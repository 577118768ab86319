"""tf_keras: these tests run in a process of their own."""

import keras_choice
from occurrences import pytest_terminal_summary  # noqa: F401

keras_choice.choose("tf_keras")
