"""Sizes that a graph computes from shapes, such as `2 * tf.shape(x)[1:3]`, and that its shape inference leaves open.

They are computed here from the shapes that are known, with a sample's number left open, and written into the graph as
constants. All that is behind them then gets the shapes that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.tf1.state import scope_of

# By type, which input holds the sizes, and of which axes of the output.
_SIZED = {
    "ResizeBilinear": (1, slice(1, 3)), "ResizeNearestNeighbor": (1, slice(1, 3)),
    "Conv2DBackpropInput": (0, slice(None)), "Reshape": (1, slice(None)),
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Mul": np.multiply, "Add": np.add, "AddV2": np.add, "Sub": np.subtract, "FloorDiv": np.floor_divide,
    "RealDiv": np.divide, "Maximum": np.maximum, "Minimum": np.minimum, "Identity": np.array, "Ceil": np.ceil,
}  # fmt: skip


def are_open(graph: Any) -> bool:
    """Whether a graph has sizes that can be written into it."""
    return any(_found(op) is not None for op in graph.get_operations())


def write_sizes(graph: Any, copied: Callable[[Any], Any]) -> None:
    """Write the sizes that can be known into a graph.

    Args:
        graph: is changed: constants in the place of what computes the same numbers.
        copied: makes a copy of a graph, in which shapes are inferred anew.
    """
    done: set[str] = set()
    while todo := {op: s for op in graph.get_operations() if op.name not in done and (s := _found(op)) is not None}:
        for op, sizes in todo.items():
            done.add(op.name)
            with graph.as_default(), tf.control_dependencies(None), tf.name_scope(f"{scope_of(op.name)}/"):
                op._update_input(_SIZED[op.type][0], _as_tensor(op, sizes))
        fresh = copied(graph)
        for op in graph.get_operations():
            for mine, theirs in zip(op.outputs, fresh.get_operation_by_name(op.name).outputs, strict=True):
                mine.set_shape(theirs.shape)


def _found(op: Any) -> np.ndarray | None:
    """The sizes of an op that its output's shape does not have, NaN for the number of samples; None if none can be."""
    if op.type not in _SIZED or op.outputs[0].shape.rank is None:
        return None
    index, axes = _SIZED[op.type]
    if None not in _but_samples(op.outputs[0].shape.as_list()[axes], axes):
        return None
    sizes = known(op.inputs[index])
    if sizes is None or sizes.ndim != 1:
        return None
    if op.type == "Reshape":
        sizes = _without_rest(sizes, op.inputs[0].shape)
    needed = _but_samples(sizes, axes)
    return None if np.isnan(needed).any() or (needed < 0).any() else sizes


def _but_samples(sizes: Any, axes: slice) -> Any:
    return sizes if axes.start else sizes[1:]


def _without_rest(sizes: np.ndarray, given: Any) -> np.ndarray:
    """The sizes of a reshape that keeps the samples, with the one computed that is what is left (-1)."""
    rest = np.flatnonzero(sizes == -1)
    if len(rest) != 1 or not np.isnan(sizes[0]) or not given.rank or None in given.as_list()[1:]:
        return sizes
    others = np.prod(np.delete(sizes, [0, rest[0]]))
    return np.where(sizes == -1, np.prod(given.as_list()[1:]) / others, sizes)


def _as_tensor(op: Any, sizes: np.ndarray) -> Any:
    """The sizes for an op; the number of samples is what it was."""
    given = op.inputs[_SIZED[op.type][0]]
    if not np.isnan(sizes[0]):
        return tf.constant(sizes.astype(int), given.dtype)
    return tf.stack([given[0], *(tf.constant(int(n), given.dtype) for n in sizes[1:])])


def known(tensor: Any) -> np.ndarray | None:
    """The numbers of a tensor as float64, NaN where they are not known; None where they do not come from shapes."""
    op = tensor.op
    if op.type == "Const":
        value = tf.get_static_value(tensor)
        return np.asarray(value, np.float64) if tensor.dtype.is_integer or tensor.dtype.is_floating else None
    if op.type == "Shape":
        shape = op.inputs[0].shape
        return None if shape.rank is None else np.array([np.nan if n is None else n for n in shape], np.float64)
    values = [known(t) for t in op.inputs] if op.type in (*_ARITHMETIC, *_MOVES) else [None]
    if any(v is None for v in values):
        return None
    with np.errstate(all="ignore"):
        result = _MOVES[op.type](op, *values) if op.type in _MOVES else _ARITHMETIC[op.type](*values)
    return None if result is None else np.asarray(result, np.float64)


def _cast(op: Any, x: np.ndarray) -> np.ndarray:
    return np.trunc(x) if op.outputs[0].dtype.is_integer else x


def _sliced(op: Any, x: np.ndarray, *limits: np.ndarray) -> np.ndarray | None:
    masks = {n: op.get_attr(f"{n}_mask") for n in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    if x.ndim != 1 or masks["ellipsis"] or masks["new_axis"] or any(np.isnan(v).any() for v in limits):
        return None
    begin, end, step = (int(v[0]) for v in limits)
    if masks["shrink_axis"]:
        return x[begin]
    return x[None if masks["begin"] else begin : None if masks["end"] else end : step]


_MOVES: dict[str, Callable[..., Any]] = {
    "Cast": _cast, "StridedSlice": _sliced,
    "Pack": lambda op, *xs: np.stack(xs, op.get_attr("axis")),
    "ConcatV2": lambda op, *xs: np.concatenate(xs[:-1], int(xs[-1])),
}  # fmt: skip
