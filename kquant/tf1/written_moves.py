"""How movements of data are written out: new axes of a slice, and movements of integers behind what is made of them.

The target's kernels move numbers on a grid. Ids that are moved before they are looked up (`tf.reshape(ids, [-1])`), or
pixels before they are cast, are looked up and cast as they come in, and what comes out of that is moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from kquant.tf1.written import Make, writes

_MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


@writes("StridedSlice")
def with_new_axes(op: Any) -> Make | None:
    """`x[..., None]`: the slice without its new axes, which a reshape adds."""
    mask, x, y = op.get_attr("new_axis_mask"), op.inputs[0], op.outputs[0]
    known = y.shape.rank and y.shape.as_list().count(None) <= 1 and y.dtype.is_floating
    limits = [tf.get_static_value(t) for t in op.inputs[1:]]
    if not mask or not known or x.shape.rank is None or any(v is None for v in limits):
        return None
    kept = [i for i in range(len(limits[0])) if not mask >> i & 1 or op.get_attr("ellipsis_mask") >> i & 1]
    sizes = [-1 if n is None else n for n in y.shape.as_list()]

    def make() -> Any:
        masks = {n: sum((op.get_attr(n) >> i & 1) << j for j, i in enumerate(kept)) for n in _MASKS[:3]}
        masks["shrink_axis_mask"] = sum((op.get_attr("shrink_axis_mask") >> i & 1) << j for j, i in enumerate(kept))
        begin, end, strides = (v[kept] for v in limits)
        part = tf.raw_ops.StridedSlice(input=x, begin=begin, end=end, strides=strides, **masks) if kept else x
        return tf.reshape(part, sizes)

    return make


# -- movements of integers --------------------------------------------------------------------------------------------

Move = Callable[[Any], Any]


@writes("GatherV2", "Gather", "ResourceGather")
def look_up_of_moved(op: Any) -> Make | None:
    """A look-up of ids that are moved before."""
    table, ids = op.inputs[:2]
    plain = op.type != "GatherV2" or tf.get_static_value(op.inputs[2]) == 0
    if not plain or ("batch_dims" in op.node_def.attr and op.get_attr("batch_dims")) or not op.outputs[0].shape.rank:
        return None
    more = op.outputs[0].shape.rank - ids.shape.rank if ids.shape.rank is not None else 0
    source, moves = moves_of(ids, more)
    if not moves:
        return None

    def make() -> Any:
        if op.type == "ResourceGather":
            found = tf.raw_ops.ResourceGather(resource=table, indices=source, dtype=op.get_attr("dtype"))
        else:
            found = tf.raw_ops.GatherV2(params=table, indices=source, axis=0)
        return moved(found, moves)

    return make


@writes("Cast")
def cast_of_moved(op: Any) -> Make | None:
    """Pixels that are moved before they become floats."""
    source, moves = moves_of(op.inputs[0], 0)
    if not moves or op.inputs[0].dtype.is_floating or op.outputs[0].dtype != tf.float32:
        return None
    return lambda: moved(tf.cast(source, tf.float32), moves)


def moves_of(tensor: Any, more: int) -> tuple[Any, list[Move]]:
    """The integers that come in behind a tensor, and how they are moved before it, the first movement first."""
    moves: list[Move] = []
    while tensor.op.type in MOVES and tensor.dtype.is_integer:
        move = MOVES[tensor.op.type](tensor.op, more)
        if move is None:
            break
        moves.insert(0, move)
        tensor = tensor.op.inputs[0]
    comes_in = tensor.op.type in ("Placeholder", "PlaceholderWithDefault", "IteratorGetNext") and tensor.shape.rank
    return (tensor, moves) if comes_in else (tensor, [])


def moved(value: Any, moves: list[Move]) -> Any:
    """A tensor after some movements."""
    for move in moves:
        value = move(value)
    return value


def _reshape(op: Any, more: int) -> Move:
    def move(x: Any) -> Any:
        ends = [int(n) for n in x.shape[x.shape.rank - more :]]
        y = tf.reshape(x, tf.concat([tf.cast(op.inputs[1], tf.int32), ends], 0) if ends else op.inputs[1])
        y.set_shape([*op.outputs[0].shape, *ends])
        return y

    return move


def _expand(op: Any, more: int) -> Move | None:
    axis = tf.get_static_value(op.inputs[1])
    if axis is None or op.outputs[0].shape.rank is None:
        return None
    return lambda x: tf.expand_dims(x, int(axis) % op.outputs[0].shape.rank)


def _squeeze(op: Any, more: int) -> Move | None:
    axes, rank = op.get_attr("squeeze_dims"), op.inputs[0].shape.rank
    return None if rank is None or not axes else lambda x: tf.squeeze(x, [a % rank for a in axes])


def _transpose(op: Any, more: int) -> Move | None:
    order = tf.get_static_value(op.inputs[1])
    if order is None:
        return None
    return lambda x: tf.transpose(x, [*order, *range(len(order), len(order) + more)])


def _strided(op: Any, more: int) -> Move | None:
    if op.get_attr("ellipsis_mask") and more:  # these would be taken into it
        return None
    return lambda x: tf.raw_ops.StridedSlice(
        input=x, begin=op.inputs[1], end=op.inputs[2], strides=op.inputs[3], **{n: op.get_attr(n) for n in _MASKS}
    )


# By type, `(op, how many axes more than the integers have) -> the movement`.
MOVES: dict[str, Callable[[Any, int], Move | None]] = {
    "Reshape": _reshape, "ExpandDims": _expand, "Squeeze": _squeeze, "Transpose": _transpose, "StridedSlice": _strided,
    "Identity": lambda op, more: lambda x: x,
}  # fmt: skip
