"""A TensorFlow 1 graph as a model: which tensors go in and come out, and where its variables have their values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.errors import ModelError, nearest
from kquant.tf1 import marks
from kquant.tf1.values import Values

SELECTION = "kquant_model"  # the collection that remembers the inputs and outputs of a quantized graph


@dataclass(frozen=True)
class GraphModel:
    """A graph as a model.

    Args:
        graph: the `tf.Graph`.
        values: of its variables; empty where there is no session.
        inputs, outputs: tensors of the graph; empty to find them.
        training: whether the graph is trained, so that observers update.
        report: of how it was rewritten.
    """

    graph: Any
    values: Values
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    training: bool = True
    report: Any = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return "graph"


def is_session(value: Any) -> bool:
    """Whether a value is a session: a plain one, an interactive one, or one that is monitored."""
    return isinstance(getattr(value, "graph", None), tf.Graph) and callable(getattr(value, "run", None))


def as_model(value: Any) -> GraphModel:
    """A graph, a session on one, or a `GraphModel`, as a `GraphModel`.

    Raises:
        ModelError: anything else that comes from TensorFlow.
    """
    if isinstance(value, GraphModel):
        return value
    if is_session(value):
        return GraphModel(value.graph, Values(value.graph, value))
    if isinstance(value, tf.Graph) and not hasattr(value, "captures"):
        return GraphModel(value, Values(value, default_session(value)))
    fix = "Build the model in `with tf.Graph().as_default():`, or hand in a Keras model"
    raise ModelError("model", "a tf.Graph, or a tf.compat.v1.Session on one", type(value).__name__, fix)


def default_session(graph: Any) -> Any:
    """The current default session if it is one on this graph, else None."""
    session = tf.compat.v1.get_default_session()
    return session if session is not None and session.graph is graph else None


def select(
    value: Any,
    *,
    inputs: Iterable[Any] | None = None,
    outputs: Iterable[Any] | None = None,
    training: bool | None = None,
    session: Any = None,
) -> GraphModel:
    """A graph or session with some of the settings of a `GraphModel` given.

    Args:
        value: a graph, a session, or a `GraphModel`.
        inputs, outputs: tensors, ops with one output, or their names.
        training: whether the graph is trained.
        session: where the variables have their values.

    Raises:
        ModelError: a tensor that is not in the graph, or a session on another graph.
    """
    model = as_model(value)
    if session is not None:
        if not is_session(session) or session.graph is not model.graph:
            what = "a session on another graph" if is_session(session) else type(session).__name__
            raise ModelError(
                "session", "a tf.compat.v1.Session on this graph", what, "Pass session= with an open session on it"
            )
        model = replace(model, values=Values(model.graph, session))
    if training is not None:
        if not isinstance(training, (bool, np.bool_)):
            fix = "A flag that is fed stays in the graph, which is then one for training"
            raise ModelError("training", "True or False", repr(training), fix)
        model = replace(model, training=bool(training))
    given = {"inputs": inputs, "outputs": outputs}
    found = {
        role: tuple(tensor_of(model.graph, t, f"{role}[{i}]") for i, t in enumerate(_listed(tensors)))
        for role, tensors in given.items()
        if tensors is not None
    }
    for role, tensors in found.items():
        names = [t.name for t in tensors]
        if not names:
            raise ModelError(
                role,
                "at least one tensor, or None to find them",
                "none",
                "Name the tensors of the model, or leave the argument out",
            )
        if len(set(names)) < len(names):
            fix = "tf.identity() makes another of one"
            raise ModelError(role, "different tensors", f"{max(names, key=names.count)!r} twice", fix)
    return replace(model, **found)


def _listed(tensors: Any) -> list[Any]:
    return [tensors] if isinstance(tensors, (str, tf.Tensor, tf.Operation)) else list(tensors)


def tensor_of(graph: Any, value: Any, where: str) -> Any:
    """A tensor of the graph from a tensor, an op with one output, or a name.

    Raises:
        ModelError: no such tensor, with the nearest names.
    """
    name = getattr(value, "name", value)
    if not isinstance(name, str):
        raise ModelError(where, "a tensor of the graph or its name", repr(value), "Write a name such as 'images:0'")
    try:
        tensor = graph.get_tensor_by_name(name if ":" in name else f"{name}:0")
    except (KeyError, ValueError) as error:
        names = [op.name for op in graph.get_operations() if op.outputs]
        fix = f"Nearest: {nearest(name.split(':')[0], names)}"
        raise ModelError(where, "a tensor of the graph or its name", repr(name), fix) from error
    if isinstance(value, (tf.Tensor, tf.Operation)) and value.graph is not graph:
        raise ModelError(
            where,
            "a tensor of this graph",
            f"{name!r} of another graph",
            "Name a tensor of the graph that is quantized or exported",
        )
    return tensor


def tensor_id(tensor: Any) -> str:
    """How a tensor is called in the neutral graph and in the artifact: its name, without `:0`."""
    return str(tensor.name).removesuffix(":0")


# -- what a quantized graph remembers -------------------------------------------------------------------------------


def remember(model: GraphModel) -> None:
    """Keep the inputs and outputs in the graph, as a collection that `MetaGraphDef` can hold."""
    names = {role: [t.name for t in getattr(model, role)] for role in ("inputs", "outputs")}
    model.graph.add_to_collection(SELECTION, json.dumps({**names, "training": model.training}))


def remembered(graph: Any) -> dict[str, Any] | None:
    """What `remember` kept, or None for a graph that is not quantized."""
    kept = graph.get_collection(SELECTION)
    if not kept:
        return None
    text = kept[-1]
    found: dict[str, Any] = json.loads(text.decode() if isinstance(text, bytes) else text)
    for role in ("inputs", "outputs"):
        found[role] = tuple(graph.get_tensor_by_name(name) for name in found[role])
    return found


# -- whether it can be rewritten ------------------------------------------------------------------------------------

_UPDATES = ("Apply", "ResourceApply", "SparseApply", "ResourceSparseApply")
_GRADIENTS = ("Grad", "GradV2", "GradV3", "GradGrad", "BackpropFilter", "BackpropFilterV2", "BackpropInputV2")


def check(value: Any) -> None:
    """Refuse a graph that cannot be rewritten any more.

    Raises:
        ModelError: a finalized graph, one that was quantized before, or one that holds training ops.
    """
    graph = as_model(value).graph
    if graph.finalized:
        fix = "Call the quantizer before the session that finalizes the graph (MonitoredTrainingSession) is made"
        raise ModelError("graph", "a graph that can still be changed", "a finalized graph", fix)
    if marks.are_in(graph):
        raise ModelError("graph", "a float graph", "a graph that kquant already quantized", "Build the graph anew")
    training = [op for op in graph.get_operations() if _trains(op)]
    if training:
        named = ", ".join(f"{op.name!r} ({op.type})" for op in training[:4])
        fix = "Call the quantizer before the optimizer's minimize(), so that gradients pass through the quantizers"
        raise ModelError("graph", "a graph without training ops", named, fix)


def _trains(op: Any) -> bool:
    if op.type.startswith(_UPDATES) or op.type.endswith(_GRADIENTS):
        return True
    return op.name.startswith("gradients/") or "/gradients/" in op.name
