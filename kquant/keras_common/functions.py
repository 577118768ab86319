"""Activation functions by name: which are ops of their own, and which are elementwise functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core import elementwise

NAMED: dict[str, tuple[str, dict]] = {
    "linear": ("identity", {}),
    "relu": ("relu", {"max": None, "fn": "relu"}),
    "relu6": ("relu", {"max": 6.0, "fn": "relu"}),
    "softmax": ("softmax", {"axis": -1}),
    "sigmoid": ("sigmoid", {}),
    "tanh": ("tanh", {}),
}
NOT_ELEMENTWISE = frozenset({"log_softmax", "glu", "sparsemax"})


def function_kind(generation: Any, function: Any) -> tuple[str, dict]:
    """The op kind of an activation function and its settings.

    Functions that Keras knows by name are told by it. Any other callable is accepted as elementwise if it proves to be
    so on probes: permuting its input permutes its output. Otherwise the settings hold a `reason`.
    """
    if callable(function):
        known = generation.known_function(function)
        if known in NAMED:
            kind, attrs = NAMED[known]
            return kind, dict(attrs)
        if known in NOT_ELEMENTWISE:
            return "opaque", {"reason": f"the function {known!r} has no integer kernel and is not elementwise"}
        if known is not None:
            return "elementwise", {"fn": known}
        if is_elementwise(function):
            return "elementwise", {"fn": getattr(function, "__name__", type(function).__name__).strip("<>")}
    return "opaque", {"reason": "the function is not elementwise, so it has no exact table"}


def is_elementwise(function: Callable) -> bool:
    """Whether a function of one tensor treats every element by itself."""
    return _takes_a_row(function) and elementwise.is_elementwise(lambda x: _run(function, x))


def _takes_a_row(function: Callable) -> bool:
    """Whether it is defined on one axis, asked without running it: some kernels end the process on another rank."""
    traced = tf.function(lambda x: tf.convert_to_tensor(function(x)), autograph=False)
    try:
        traced.get_concrete_function(tf.TensorSpec((8,), tf.float32))
    except Exception:  # whatever a user's function raises
        return False
    return True


def _run(function: Callable, x: np.ndarray) -> np.ndarray:
    return np.asarray(tf.convert_to_tensor(function(tf.convert_to_tensor(x))))
