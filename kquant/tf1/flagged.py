"""Batch norms that a flag decides on: their moving averages, and how they are frozen while training goes on.

Such a norm takes its moving averages in one branch of a conditional, and the batch's statistics in the other. While it
is frozen, the conditionals that it consists of, and those that update its averages, take the branch of the averages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from kquant.tf1 import marks
from kquant.tf1.flags import CONDITIONALS, SWITCHES, evaluated, outside, switch_of, value_in_evaluation
from kquant.tf1.match import Found, Matcher
from kquant.tf1.match_elementwise import RANDOM
from kquant.tf1.rewire import Slot, readers, redirect
from kquant.tf1.statistics import ARITHMETIC, ASSIGNS
from kquant.tf1.values import variable_of

FUSED = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
ROOTS = ("Rsqrt", "Sqrt", "Pow")
_PASSED = (*ARITHMETIC, "Reshape", "Squeeze", "ExpandDims", "StopGradient", "RealDiv")


@dataclass(frozen=True)
class Flagged:
    """A batch norm that a flag decides on.

    Args:
        mean, variance: op names of the variables that hold its moving averages.
        decided: the tensors at which the flag decides.
        is_still: whether it takes them with the flag off; with a flag that says that it is a test it does not.
    """

    mean: str
    variance: str
    decided: tuple[Any, ...]
    is_still: bool = True


def flagged(m: Matcher, found: Found, statistics: tuple[Any, Any] | None) -> Flagged | None:
    """The batch norm of a flag that an op is, or None where it is none, or not one whose averages can be told.

    Args:
        m: the matcher.
        found: the op.
        statistics: the batch's mean and variance where the op is read as normalizing by those.
    """
    part = behind(m, found)
    if not part.decided or not all(map(places_of, part.decided)):
        return None
    if statistics is not None:
        mean, variance = (m.evaluator.statistics[t.name] for t in statistics)
        return Flagged(mean, variance, part.decided, is_still=False)
    trained = {v.op.name for v in m.evaluator.graph.get_collection(tf.compat.v1.GraphKeys.TRAINABLE_VARIABLES)}
    means, variances = part.others - part.rooted - trained, part.rooted - trained
    if found.anchor.type in FUSED:
        means, variances = (m.variables(t) for t in found.attrs["parameters"][2:4])
    if len(means) != 1 or len(variances) != 1:
        return None
    return Flagged(means.pop(), variances.pop(), part.decided)


@dataclass(frozen=True)
class Behind:
    """What lies between an op's sources and its output.

    Args:
        decided: the tensors at which a flag decides.
        rooted, others: names of the variables in it, those under a root and those that are not.
        is_random: whether random numbers are in it.
    """

    decided: tuple[Any, ...]
    rooted: set[str]
    others: set[str]
    is_random: bool


def behind(m: Matcher, found: Found) -> Behind:
    """What an op is made of, with the flags off."""
    stop = {s.name for s in found.sources if isinstance(s, tf.Tensor)}
    decided, variables, types = {}, {True: set[str](), False: set[str]()}, set()
    todo, seen = [(found.output, False)], set()
    while todo:
        tensor, rooted = todo.pop()
        if tensor.name in stop or (tensor.name, rooted) in seen:
            continue
        seen.add((tensor.name, rooted))
        types.add(tensor.op.type)
        variable, chosen = variable_of(tensor), evaluated(tensor)
        if variable is not None:
            variables[rooted].add(variable.name)
        elif chosen is not None:
            decided[tensor.name] = tensor
            todo.append((chosen, rooted))
        elif tensor.name not in m.evaluator.statistics:
            todo += [(t, rooted or tensor.op.type in ROOTS) for t in tensor.op.inputs]
    return Behind(tuple(decided.values()), variables[True], variables[False], bool(types & {*RANDOM}))


# -- freezing ---------------------------------------------------------------------------------------------------------


def freeze_with(m: Matcher, norm: Flagged, is_frozen: Any) -> None:
    """Let a norm take its moving averages, and leave them as they are, while a tensor is true."""
    decided, statistics = {t.name: t for t in norm.decided}, {}
    for name in (norm.mean, norm.variance):
        for places, batch in _updates(m, name):
            decided.update({t.name: t for t in places})
            statistics.update({t.name: (t, name) for t in batch})
    chosen: dict[str, Any] = {}
    for op, index in dict.fromkeys(p for t in decided.values() for p in places_of(t)):
        flag = op.inputs[index]
        if flag.name not in chosen:
            chosen[flag.name] = _or_frozen(flag, is_frozen, norm.is_still)
        redirect([(op, index)], chosen[flag.name])
    for statistic, name in statistics.values():
        where = readers(statistic)
        average = tf.reshape(value_of(m, name), statistic.shape.as_list())
        result = tf.identity(tf.where(is_frozen, average, statistic), marks.STATISTIC)
        marks.put(result.op, marks.STATISTIC, input=statistic.name)
        redirect(where, result)


def _or_frozen(flag: Any, is_frozen: Any, is_still: bool) -> Any:
    """A conditional's predicate, which takes the branch of the moving averages while the norm is frozen."""
    averages = value_in_evaluation(flag) == is_still
    result = tf.logical_or(flag, is_frozen) if averages else tf.logical_and(flag, tf.logical_not(is_frozen))
    marks.put(result.op, marks.PREDICATE, input=flag.name)
    return result


def value_of(m: Matcher, name: str) -> Any:
    """A new tensor with the value of a variable, read in the run in which it is used."""
    (tensor,) = m.evaluator.graph.get_operation_by_name(name).outputs
    if tensor.dtype != tf.resource:
        return tf.identity(tensor)
    return tf.raw_ops.ReadVariableOp(resource=tensor, dtype=tensor.op.get_attr("dtype"))


def _updates(m: Matcher, name: str) -> Iterator[tuple[list[Any], list[Any]]]:
    """For each update of an average: the tensors at which a flag decides on it, or else the statistics in it."""
    (handle,) = m.evaluator.graph.get_operation_by_name(name).outputs
    for op in handle.consumers():
        if op.type in CONDITIONALS and marks.of(op, marks.CONDITIONAL) is not None:
            yield [op.outputs[0]], []
    for op in m.evaluator.graph.get_operations():
        if op.type in ASSIGNS:
            variable = variable_of(outside(op.inputs[0]))
            if variable is not None and variable.name == name:
                yield _update(m, op)


def _update(m: Matcher, assign: Any) -> tuple[list[Any], list[Any]]:
    """Where a flag decides on an assignment; or the batch statistics that it averages whatever the flag is."""
    pivots = [op.inputs[0] for op in assign.control_inputs if op.type == "Identity"]
    decided = [t for t in (assign.inputs[0], *pivots) if t.op.type in SWITCHES and evaluated(t) is not None]
    statistics, todo, seen = [], [assign.inputs[1]], set()
    while todo:
        tensor = todo.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        if evaluated(tensor) is not None:
            decided.append(tensor)
        elif tensor.name in m.evaluator.statistics:
            statistics.append(tensor)
        elif tensor.op.type in _PASSED:
            todo += list(tensor.op.inputs)
    return decided, [] if decided else statistics


def places_of(tensor: Any) -> list[Slot]:
    """The inputs of graph ops through which the conditional that decides on a tensor sees its flag.

    Empty where it reads the flag without an identity of its own, as other conditionals on the flag then do too.
    """
    op = tensor.op
    if op.type in CONDITIONALS:
        return [(op, 0)]
    switch = op if op.type in SWITCHES else switch_of(op)
    flag, scope = switch.inputs[1], _scope(switch)
    if switch.inputs[0] is not flag:  # a tensor that is handed in; what hands in the flag itself is the pivot
        if flag.op.type != "Identity":
            return []
        flag, scope = flag.op.inputs[0], _scope(flag.op)
    return [(op, i) for op, i in readers(flag) if _scope(op) == scope and op.type in (*SWITCHES, "Identity")]


def _scope(op: Any) -> str:
    return str(op.name).rpartition("/")[0]
