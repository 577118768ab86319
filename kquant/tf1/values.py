"""The values of a graph's variables: read from a session when asked for, and written to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.errors import ModelError, some

RESOURCE = "VarHandleOp"
REFERENCES = ("VariableV2", "Variable")
# Ops that pass a resource handle on.
_PASSING = ("Identity", "Enter", "Switch", "RefSwitch")


def variable_of(tensor: Any) -> Any | None:
    """The variable op whose value (a read, or the reference itself) or handle a tensor is, or None."""
    op = tensor.op
    while op.type in _PASSING and tensor.dtype == tf.resource:
        op = op.inputs[0].op
    if op.type == "ReadVariableOp":
        return variable_of(op.inputs[0])
    return op if op.type == RESOURCE or op.type in REFERENCES else None


def raw(session: Any, run: Callable[[Any], Any]) -> Any:
    """Call `run` with the plain session behind a monitored one, so that none of its hooks is triggered."""
    if hasattr(session, "run_step_fn"):
        return session.run_step_fn(lambda step_context: run(step_context.session))
    return run(session)


class Values:
    """Values by the names of variable ops, read once.

    Only variables are read: nothing of the graph's computation runs.

    Args:
        graph: the graph.
        session: where the variables live, or None.
    """

    def __init__(self, graph: Any, session: Any = None):
        self.graph, self.session = graph, session
        self.known: dict[str, np.ndarray] = {}
        self.changed: set[str] = set()
        self.version = 0

    def get(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The values of some variables.

        Raises:
            ModelError: no session, or variables without a value, by name.
        """
        names = list(dict.fromkeys(names))
        missing = [n for n in names if n not in self.known]
        if missing:
            self.known.update(self._read(missing))
        return {n: self.known[n] for n in names}

    def set(self, values: Mapping[str, Any], changed: bool = True) -> None:
        """Set values here; `commit` writes those that changed to the session."""
        self.version += 1
        for name, value in values.items():
            self.known[name] = np.asarray(value)
        if changed:
            self.changed.update(values)

    @contextlib.contextmanager
    def instead(self, values: Mapping[str, Any]) -> Iterator[None]:
        """Other values for a while, which nothing writes to the session."""
        before = self.get(values)
        self.set(values, changed=False)
        try:
            yield
        finally:
            self.set(before, changed=False)

    def commit(self, again: Iterable[str] = ()) -> None:
        """Write what changed, and the variables named, to the session if there is one."""
        names = sorted({*self.changed, *again})
        if self.session is not None and names:
            raw(self.session, lambda session: self._write(session, names))
        self.changed.clear()

    def _write(self, session: Any, names: list[str]) -> None:
        pending = {n: self.assignment(n) for n in names}
        while pending:
            # Variables that were made from one tensor share their feed, so they go in separate runs.
            now = {op.inputs[1].name: (n, op) for n, op in reversed(pending.items())}
            session.run([op for _, op in now.values()], {op.inputs[1]: self.known[n] for n, op in now.values()})
            for name, _ in now.values():
                del pending[name]

    def assignment(self, name: str) -> Any:
        """An op that assigns the variable (its initializer): fed with another value it assigns that one."""
        (tensor,) = self.graph.get_operation_by_name(name).outputs
        for op in tensor.consumers():
            if op.type in ("Assign", "AssignVariableOp") and op.inputs[0] is tensor and not op.control_inputs:
                return op
        if self.graph.finalized or tensor.dtype != tf.resource:
            raise ModelError(
                f"variable {name!r}",
                "a variable with an initializer",
                "none in the graph",
                "Make the variable with tf.compat.v1.get_variable, which gives it one",
            )
        dtype = tensor.op.get_attr("dtype")
        with self.graph.as_default(), tf.control_dependencies(None), tf.name_scope("kquant/assign/"):
            return tf.raw_ops.AssignVariableOp(resource=tensor, value=tf.compat.v1.placeholder(dtype))

    def _read(self, names: list[str]) -> dict[str, np.ndarray]:
        if self.session is None:
            fix = "Run inside `with session.as_default():`, or pass session=, after the variables are initialized"
            raise ModelError(
                f"variables {some(names)}", "a session that holds the values of the graph's variables", "none", fix
            )
        fetches = {n: self.value_tensor(n) for n in names}
        try:
            found: dict[str, np.ndarray] = raw(self.session, lambda session: session.run(fetches))
        except tf.errors.FailedPreconditionError as error:
            raise ModelError(
                f"variables {some(self._uninitialized(fetches))}",
                "initialized variables",
                "variables without a value in this session",
                "Run their initializers, or restore a checkpoint",
            ) from error
        except RuntimeError as error:  # what a closed session raises
            fix = "Export, verify and calibrate before the session is closed"
            raise ModelError(f"variables {some(names)}", "an open session", str(error), fix) from error
        return found

    def _uninitialized(self, fetches: Mapping[str, Any]) -> list[str]:
        present = self.present(fetches)
        return [n for n in fetches if n not in present]

    def present(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The values of those variables that have one in the session."""

        def read(session: Any) -> dict[str, np.ndarray]:
            found = {}
            for name in names:
                with contextlib.suppress(tf.errors.FailedPreconditionError):
                    found[name] = session.run(self.value_tensor(name))
            return found

        found: dict[str, np.ndarray] = raw(self.session, read)
        return found

    def value_tensor(self, name: str) -> Any:
        """A tensor with the value of a variable that depends on nothing else."""
        (tensor,) = self.graph.get_operation_by_name(name).outputs
        if tensor.dtype != tf.resource:
            return tensor
        for op in tensor.consumers():
            if op.type == "ReadVariableOp" and not op.control_inputs:
                return op.outputs[0]
        if self.graph.finalized:
            raise ModelError(
                f"variable {name!r}",
                "a read of the variable without control dependencies",
                "none",
                "Read the variable once outside of tf.control_dependencies",
            )
        with self.graph.as_default(), tf.control_dependencies(None), tf.name_scope("kquant/read/"):
            return tf.raw_ops.ReadVariableOp(resource=tensor, dtype=tensor.op.get_attr("dtype"))
