"""The variables that kquant adds to a graph: resource variables, saved with all others, never trained."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import tensorflow as tf

SCOPE = "kquant"


def scope_of(name: str) -> str:
    """The scope of what is added for a tensor or an op."""
    return f"{SCOPE}/" + re.sub(r"[^A-Za-z0-9_.\-/]", "_", name)


class State:
    """Adds variables to a graph and remembers their first values.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: Any):
        self.graph = graph
        self.first: dict[str, np.ndarray] = {}

    def variable(self, name: str, value: np.ndarray) -> Any:
        """A new variable of this name, which must not exist yet."""
        array = np.asarray(value)
        with tf.name_scope(""), tf.control_dependencies(None):
            variable = tf.compat.v1.Variable(array, trainable=False, use_resource=True, name=name, dtype=array.dtype)
        self.first[variable.op.name] = array
        return variable

    def started(self, start_step: int) -> Any:
        """Whether the global step has reached a step, as a tensor; None for the step 0, which it always has."""
        if not start_step:
            return None
        step = tf.compat.v1.train.get_or_create_global_step(self.graph)
        value = step.read_value() if hasattr(step, "read_value") else tf.identity(step)
        return tf.cast(value, tf.int64) >= start_step

    def step_name(self, start_step: int) -> str | None:
        """The name of the global step's variable op, where it is needed."""
        if not start_step:
            return None
        return str(tf.compat.v1.train.get_or_create_global_step(self.graph).op.name)
