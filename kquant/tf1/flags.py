"""Flags that are fed: what a conditional on one is in evaluation.

A graph that serves training and evaluation asks a boolean placeholder (`is_training`) which of the two it is to be.
Read as a model it is evaluated, with the flag false. Training runs the conditional as it stands.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kquant.core.errors import ModelError
from kquant.tf1 import marks

_FLAGS = ("Placeholder", "PlaceholderV2", "PlaceholderWithDefault")
SWITCHES = ("Switch", "RefSwitch")
CONDITIONALS = ("If", "StatelessIf")
_LOOPS = ("NextIteration", "Enter", "RefEnter", "RefNextIteration")


def is_flag(tensor: Any) -> bool:
    """Whether a tensor is a flag that is fed: a single truth value."""
    return tensor.op.type in _FLAGS and tensor.dtype == tf.bool and not tensor.shape.rank


def decides_on_more(what: str) -> ModelError:
    """The refusal of a flag that decides on anything but batch norm and dropout."""
    fix = "Build the graph with training=True to train it, and with training=False to evaluate it"
    return ModelError("graph", "flags that decide on batch norm and dropout only", what, fix)


def value_in_evaluation(predicate: Any) -> bool | None:
    """The value of a conditional's predicate in evaluation; None where no flag and no constant decides it."""
    op = predicate.op
    if is_flag(predicate):
        return False
    if op.type in ("Identity", "Squeeze", "Reshape", "ToBool", *SWITCHES):
        return value_in_evaluation(op.inputs[0])
    if op.type == "LogicalNot":
        value = value_in_evaluation(op.inputs[0])
        return None if value is None else not value
    if op.type in ("LogicalAnd", "LogicalOr"):
        mark = marks.of(op, marks.PREDICATE)
        if mark is not None:
            return value_in_evaluation(op.graph.get_tensor_by_name(mark["input"]))
        decides = op.type == "LogicalOr"  # one operand of this value decides
        values = [value_in_evaluation(t) for t in op.inputs]
        return decides if decides in values else None if None in values else not decides
    return bool(tf.get_static_value(predicate)) if op.type == "Const" else None


def flags_of(tensor: Any) -> list[Any]:
    """The flags that a predicate is made of."""
    if is_flag(tensor):
        return [tensor]
    return [flag for source in tensor.op.inputs for flag in flags_of(source)]


def predicate(tensor: Any) -> Any:
    """The predicate of the conditional that decides on a tensor, as it is outside of all conditionals."""
    op = tensor.op
    switch = op if op.type in SWITCHES else None if op.type in CONDITIONALS else switch_of(op)
    found = op.inputs[0] if switch is None else switch.inputs[1]
    while found.op.type in ("Identity", *SWITCHES):
        found = found.op.inputs[0]
    return found


def evaluated(tensor: Any) -> Any | None:
    """The tensor that one which a flag decides is in evaluation; None where no flag decides.

    For what enters a conditional (`Switch`) that is what it is outside, and for what comes out of one (`Merge`, or `If`
    once its branch is inlined) it is the result of the branch that evaluation takes.
    """
    op = tensor.op
    if op.type in SWITCHES:
        return None if value_in_evaluation(op.inputs[1]) is None else op.inputs[0]
    if op.type == "Merge" and tensor.value_index == 0:
        value = _merged(op)
        return None if value is None else op.inputs[int(value)]  # tf.cond merges [false, true]
    if op.type in CONDITIONALS:
        mark = marks.of(op, marks.CONDITIONAL)
        # Gradients add outputs to a conditional, for what its branches keep.
        known = [] if mark is None else mark["evaluation"][tensor.value_index :]
        return tensor.graph.get_tensor_by_name(known[0]) if known else None
    return None


def outside(tensor: Any) -> Any:
    """What a tensor inside a branch stands for outside of it, where it is only handed in."""
    while tensor.op.type in SWITCHES and evaluated(tensor) is not None:
        tensor = tensor.op.inputs[0]
    return tensor


def handed_on(tensor: Any) -> Any | None:
    """The tensor that a conditional only hands on in evaluation, or a switch in; None if it computes anything."""
    inner = tensor if tensor.op.type in SWITCHES else evaluated(tensor)
    while not is_handed_in(tensor, inner):
        if inner.op.type != "Identity":
            return None
        inner = inner.op.inputs[0]
    return outside(inner)


def is_handed_in(tensor: Any, inner: Any) -> bool:
    """Whether what the branch behind a conditional's result reads is computed outside of it."""
    if tensor.op.type in CONDITIONALS:
        return marks.of(inner.op, marks.EVALUATION) is None
    return inner.op.type in SWITCHES


def _merged(merge: Any) -> bool | None:
    """The predicate's value of the conditional that a merge ends: that of a switch which its inputs come from."""
    switch = switch_of(merge)
    return None if switch is None else value_in_evaluation(switch.inputs[1])


def switch_of(merge: Any) -> Any | None:
    """A switch of the conditional that a merge ends; None for a merge of a loop."""
    todo, seen = [t.op for t in merge.inputs], set()
    if any(op.type in _LOOPS for op in todo):
        return None
    while todo:
        op = todo.pop()
        if op.name in seen:
            continue
        seen.add(op.name)
        if op.type in SWITCHES:
            return op
        todo += [*(t.op for t in op.inputs), *op.control_inputs]
    return None
