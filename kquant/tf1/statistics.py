"""Which variable holds the moving average of which batch statistic.

A training graph normalizes by the statistics of its batch and updates their moving averages beside that. What is
exported normalizes by the moving averages, so they are found from the ops that update them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kquant.tf1 import marks
from kquant.tf1.flags import CONDITIONALS, evaluated
from kquant.tf1.values import variable_of

ASSIGNS = (
    "Assign", "AssignAdd", "AssignSub", "AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp",
)  # fmt: skip
# The arithmetic of an update: `v -= (v - s) * (1 - decay)`, `v = v * decay + s * (1 - decay)`, Bessel's correction.
ARITHMETIC = ("Sub", "Mul", "Add", "AddV2", "AddN", "Neg", "Identity", "Cast", "Select", "SelectV2")
_SKIPPED = ("biased", "local_step")  # the helpers of a zero-debiased average


def moving_averages(graph: Any, depends: set[str]) -> dict[str, str]:
    """For every batch statistic (a tensor name), the op name of the variable that holds its moving average.

    Args:
        graph: the graph.
        depends: names of the tensors that depend on data.
    """
    updates = _updates(graph)
    debiased = {helper: name for name, helper in _debiased_by(updates).items()}
    found: dict[str, str] = {}
    for name, value in updates:
        if value.name not in depends or not value.shape.rank or _helper(value):
            continue
        if name in debiased or not name.endswith(_SKIPPED):
            for statistic in _averaged(value, depends):
                found.setdefault(statistic.name, debiased.get(name, name))
    return found


def debiased_by(graph: Any) -> dict[str, str]:
    """For every debiased average (the op name of its variable), the helper that it is assigned a share of.

    The helper averages from a start at zero, and what is assigned is the helper by what its steps add up to (Kingma
    and Ba 2015, section 3).
    """
    return _debiased_by(_updates(graph))


def _debiased_by(updates: list[tuple[str, Any]]) -> dict[str, str]:
    return {name: helper for name, value in updates if (helper := _helper(value)) is not None}


def _updates(graph: Any) -> list[tuple[str, Any]]:
    """The assignments to variables in a graph: the variable's op name and the tensor that changes it."""
    found = [(variable_of(op.inputs[0]), op.inputs[1]) for op in graph.get_operations() if op.type in ASSIGNS]
    return [(variable.name, value) for variable, value in found if variable is not None]


def _helper(value: Any) -> str | None:
    """The variable of which a share is assigned, where `value` is one."""
    if value.op.type != "RealDiv":
        return None
    source = value.op.inputs[0]
    variable = variable_of(source.op.inputs[0] if source.op.type in ASSIGNS else source)
    return None if variable is None else str(variable.name)


def _averaged(value: Any, depends: set[str]) -> list[Any]:
    """The data-dependent tensors that an update averages: where its arithmetic ends."""
    found, todo, seen = [], [value], set()
    while todo:
        tensor = todo.pop()
        if tensor.name in seen or tensor.name not in depends:
            continue
        seen.add(tensor.name)
        mark = marks.of(tensor.op, marks.STATISTIC)
        if mark is not None:  # a statistic that can be frozen stands for itself and for what is behind it
            found += [tensor, tensor.graph.get_tensor_by_name(mark["input"])]
        elif evaluated(tensor) is not None:
            todo.append(evaluated(tensor))
        elif tensor.op.type in ARITHMETIC:
            todo += list(tensor.op.inputs)
        elif tensor.shape.rank:
            found.append(tensor)
    return found


def dependents(sources: list[Any], cut: Collection[str] = ()) -> set[str]:
    """Names of the tensors that depend on any of these, other than through the tensors that are cut."""
    found, todo = {t.name for t in sources}, list(sources)
    chosen = _chosen(sources[0].graph) if sources else {}
    while todo:
        source = todo.pop()
        results = [t for t in chosen.get(source.name, ()) if t.name not in found and t.name not in cut]
        found.update(t.name for t in results)
        todo += results
        for op in source.consumers():
            made = list(op.outputs)
            if op.type == "IdentityN":  # each output is its own input
                made = [t for t, x in zip(made, op.inputs, strict=True) if x is source]
            if op.type in (*CONDITIONALS, "Merge"):  # in evaluation it depends on one of its branches only
                made = [t for t in made if evaluated(t) is None or evaluated(t) is source]
            fresh = [t for t in made if t.name not in found and t.name not in cut]
            found.update(t.name for t in fresh)
            todo += fresh
    return found


def _chosen(graph: Any) -> dict[str, list[Any]]:
    """For the tensors that end an inlined branch, what comes out of the conditional."""
    table: dict[str, list[Any]] = {}
    for op in graph.get_operations():
        if op.type in CONDITIONALS and marks.of(op, marks.CONDITIONAL) is not None:
            for tensor in op.outputs:
                result = evaluated(tensor)
                if result is not None:
                    table.setdefault(result.name, []).append(tensor)
    return table
