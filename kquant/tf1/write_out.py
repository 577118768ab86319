"""Write ops out in others that the operator table knows: a sum of many in sums of two, an einsum in matrix products.

What is written out takes the place of the op for all that reads it. A graph is read before anybody has decided to
change it, so it is then done in a copy; a quantizer does the same in the graph itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph_def

from kquant.tf1 import marks, written_moves, written_tables  # noqa: F401  they enter their forms
from kquant.tf1.flags import CONDITIONALS, value_in_evaluation
from kquant.tf1.rewire import readers, redirect
from kquant.tf1.sizes import are_open, write_sizes
from kquant.tf1.state import scope_of
from kquant.tf1.written import FORMS, OF_DATA


def copied(graph: Any) -> Any:
    """A copy of a graph with the same names and shapes; collections and devices aside."""
    copy = tf.Graph()
    with copy.as_default():
        tf.import_graph_def(graph.as_graph_def(), name="")
    for op in graph.get_operations():
        for mine, theirs in zip(copy.get_operation_by_name(op.name).outputs, op.outputs, strict=True):
            mine.set_shape(theirs.shape)
    return copy


def can(graph: Any) -> bool:
    """Whether a graph holds ops that may have to be written out."""
    if are_open(graph):
        return True
    return any(_is_open(op) or (op.type in FORMS and FORMS[op.type](op) is not None) for op in graph.get_operations())


def write_out(graph: Any, depends: set[str], only: Collection[str] | None = None) -> None:
    """Write ops and computed sizes out, and inline the branches that evaluation takes of conditionals on a flag.

    Args:
        graph: is changed.
        depends: names of the tensors that depend on data.
        only: names of the ops to write out; None for all that can be.
    """
    write_sizes(graph, copied)
    _inline_all(graph)
    for op in graph.get_operations():
        form = FORMS.get(op.type)
        needed = op.inputs if op.type in OF_DATA else op.outputs
        if form is None or not (all(t.name in depends for t in needed) if only is None else op.name in only):
            continue
        parts = form(op)
        if parts is not None:
            _replace(graph, op, parts)


def written_out(op: Any) -> str | None:
    """The name of the op that another one ends the writing out of, or None."""
    mark = marks.of(op, marks.WRITTEN_OUT)
    return None if mark is None else str(mark["input"]).removesuffix(":0")


def _replace(graph: Any, op: Any, make: Callable[[], Any]) -> None:
    where, before = readers(op.outputs[0]), len(graph.get_operations())
    with graph.as_default(), tf.control_dependencies(None), tf.name_scope(f"{scope_of(op.name)}/"):
        value = make()
        result = tf.identity(value, "written_out")
    result.set_shape(op.outputs[0].shape)
    for part in graph.get_operations()[before:]:
        marks.put(part, marks.PART, of=op.name)
    marks.put(result.op, marks.WRITTEN_OUT, input=op.outputs[0].name)
    redirect(where, result)


# -- conditionals -----------------------------------------------------------------------------------------------------


def _is_open(op: Any) -> bool:
    """Whether an op is a conditional on a flag whose branch for evaluation is not inlined yet."""
    is_flagged = op.type in CONDITIONALS and value_in_evaluation(op.inputs[0]) is not None
    return is_flagged and marks.of(op, marks.CONDITIONAL) is None


def _inline_all(graph: Any) -> None:
    todo = [op for op in graph.get_operations() if _is_open(op)]
    if not todo:
        return
    library = {f.signature.name: f for f in graph.as_graph_def().library.function}
    while todo:
        op = todo.pop()
        before = len(graph.get_operations())
        branch = "then_branch" if value_in_evaluation(op.inputs[0]) else "else_branch"
        _inline(graph, op, library[op.get_attr(branch).name])
        fresh = graph.get_operations()[before:]
        for part in fresh:
            marks.put(part, marks.EVALUATION, of=op.name)
        todo += [part for part in fresh if _is_open(part)]


def _inline(graph: Any, op: Any, function: Any) -> None:
    """Put a branch of a conditional beside it, on what the conditional captures."""
    definition, flat = function_def_to_graph_def(function)
    arguments = [f"{flat[a.name]}" for a in function.signature.input_arg]
    results = [flat[function.ret[a.name]] for a in function.signature.output_arg]
    captured = dict(zip(arguments, op.inputs[1:], strict=True))
    with graph.as_default(), tf.control_dependencies(None):
        made = tf.import_graph_def(
            definition, input_map=captured, return_elements=results, name=f"{op.name}/evaluation"
        )
    for tensor, result in zip(made, op.outputs, strict=True):
        if tensor.op.graph is graph and tensor.shape.rank is None:
            tensor.set_shape(result.shape)
    marks.put(op, marks.CONDITIONAL, evaluation=[t.name for t in made])
