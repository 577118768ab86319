"""Hand what was rewritten and calibrated to the graph and to its session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.calibration import batches
from kquant.core.graph import Graph
from kquant.tf1.graphs import GraphModel
from kquant.tf1.read import legible, read_with_source
from kquant.tf1.values import REFERENCES, RESOURCE, Values


def as_float32(model: Any) -> Any:
    """The model itself: tensors of other float dtypes are refused where they are read."""
    return model


def prepare(value: Any, graph: Graph, data: Any) -> Any:
    """Refuse calibration that would fail, while the graph is still as it was.

    Args:
        value: the float graph, a session on it, or a `GraphModel`.
        graph: as it was read.
        data: for calibration. An iterator is read to its end and kept, since any of its batches may not fit.

    Returns:
        The data to calibrate with.

    Raises:
        ModelError: no session, or variables without a value. CalibrationError: data that does not fit.
    """
    model = legible(value)
    operations = [model.graph.get_operation_by_name(n) for n in read_with_source(model)[1].needed]
    model.values.get(sorted(op.name for op in operations if op.type in (RESOURCE, *REFERENCES)))
    if isinstance(data, Iterator):
        data = list(data)
    for _ in batches(data, graph):
        pass
    return data


def take_state(model: GraphModel, exact: GraphModel) -> None:
    """Make the ranges that calibration set the first values of their variables.

    Whichever session initializes the graph then starts from them, as those of a MonitoredTrainingSession do.
    """
    with model.graph.as_default(), tf.control_dependencies(None), tf.name_scope("kquant/calibrated/"):
        for name in sorted(model.values.changed):
            model.values.assignment(name)._update_input(1, tf.constant(model.values.known[name]))


def deliver(model: GraphModel) -> Any:
    """What the quantizer returns, the report; the session, if there is one, is brought up to date.

    A session keeps running the ops that it has run before as they were. So it goes on as a new one on the changed
    graph, with the values of its variables; iterators and tables have to be initialized again.
    """
    session, values = model.values.session, model.values
    if session is not None:
        carried = _initialized(values)
        fresh = tf.compat.v1.Session(session.sess_str, graph=model.graph, config=session._config)
        session._session, fresh._session = fresh._session, session._session
        fresh.close()
        values.set(carried, changed=False)
        own = [op.name for op in model.graph.get_operations() if op.name in values.known]
        values.commit([*carried, *own])
    return model.report


def _initialized(values: Values) -> dict[str, np.ndarray]:
    """The values of all variables that have one in the session, but for those that kquant added."""
    names = [op.name for op in values.graph.get_operations() if op.type in (RESOURCE, *REFERENCES)]
    return values.present([n for n in names if n not in values.known or not n.startswith("kquant/")])
