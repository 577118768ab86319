"""Activation functions by name: which are ops of their own, and which are elementwise functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from keras import activations, ops

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


def function_kind(function: Callable) -> tuple[str, dict]:
    """The op kind of an activation function and its settings.

    Functions that Keras knows by name are told by it. Any other callable is accepted as elementwise if it proves to be
    so on probes: permuting its input permutes its output. Otherwise the settings hold a `reason`.
    """
    if isinstance(function, type(activations.relu)) or callable(function):
        name = getattr(function, "__name__", type(function).__name__)
        known = getattr(activations, name, None) is function
        if known and name in NAMED:
            kind, attrs = NAMED[name]
            return kind, dict(attrs)
        if known and name in NOT_ELEMENTWISE:
            return "opaque", {"reason": f"the function {name!r} has no integer kernel and is not elementwise"}
        if known:
            return "elementwise", {"fn": name}
        if is_elementwise(function):
            return "elementwise", {"fn": name.strip("<>")}
    return "opaque", {"reason": "the function is not elementwise, so it has no exact table"}


def is_elementwise(function: Callable) -> bool:
    """Whether a function of one tensor treats every element by itself."""
    return elementwise.is_elementwise(lambda x: _run(function, x))


def _run(function: Callable, x: np.ndarray) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(function(ops.convert_to_tensor(x))))
