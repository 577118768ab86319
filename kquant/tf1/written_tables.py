"""How a look-up in a table of several parts is written out: as one in the whole table.

`embedding_lookup` in a partitioned variable sorts the ids by the part that holds them, looks each kind up in its part,
and puts what it finds in the order of the ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kquant.tf1.written import Make, writes
from kquant.tf1.written_moves import moved, moves_of

_GATHERS = ("GatherV2", "Gather", "ResourceGather")


@writes("ParallelDynamicStitch", "DynamicStitch")
def look_up_in_parts(op: Any) -> Make | None:
    """A look-up in the parts of a table, as both strategies of `embedding_lookup` divide it."""
    found = [t.op for t in op.inputs[op.get_attr("N") :]]
    if any(o.type not in _GATHERS or o.inputs[1].op.type != "DynamicPartition" for o in found):
        return None
    sorting = found[0].inputs[1].op
    if any(o.inputs[1] is not sorting.outputs[i] for i, o in enumerate(found)) or len(sorting.outputs) != len(found):
        return None
    ids, rows = _ids(sorting), [_rows(o) for o in found]
    order = None if ids is None or None in rows else _order(sorting.inputs[1].op.type, rows)
    if order is None:
        return None
    source, moves = moves_of(ids, 1)

    def make() -> Any:
        parts = [
            tf.raw_ops.ReadVariableOp(resource=o.inputs[0], dtype=o.get_attr("dtype"))
            if o.type == "ResourceGather" else o.inputs[0] for o in found
        ]  # fmt: skip
        for part, size in zip(parts, rows, strict=True):
            part.set_shape([size, op.outputs[0].shape[-1]])
        table = tf.concat(parts, 0)
        if list(order) != list(range(len(order))):
            table = tf.gather(table, order)
        return moved(tf.gather(table, source), moves)

    return make if op.outputs[0].shape.rank == 2 else None


def _ids(sorting: Any) -> Any | None:
    """The ids that are sorted, of which both the part and the place in it are computed; None for another sorting."""
    parts = sorting.inputs[1].op
    if parts.type == "FloorMod":
        places, count = sorting.inputs[0].op, len(sorting.outputs)
        same = places.type == "FloorDiv" and places.inputs[0] is parts.inputs[0]
        numbers = [tf.get_static_value(o.inputs[1]) for o in (parts, places)]
        return parts.inputs[0] if same and numbers == [count, count] else None
    if parts.type == "Maximum" and all(t.op.type == "FloorDiv" for t in parts.inputs):
        ids, behind = parts.inputs[0].op.inputs[0], parts.inputs[1].op.inputs[0]
        return ids if behind.op.type == "Sub" and behind.op.inputs[0] is ids else None
    return None


def _rows(op: Any) -> int | None:
    """The number of rows of the part that an op looks up in."""
    table = op.inputs[0]
    if op.type != "ResourceGather":
        return None if not table.shape.rank else table.shape[0]
    while table.op.type == "Identity":
        table = table.op.inputs[0]
    shape = tf.TensorShape(table.op.get_attr("shape")) if table.op.type == "VarHandleOp" else tf.TensorShape(None)
    return shape[0] if shape.rank else None


def _order(assigned_by: str, rows: list[int]) -> np.ndarray | None:
    """For each id, its row in the parts one behind the other; None for parts of sizes that no strategy gives."""
    count, total = len(rows), sum(rows)
    even = [total // count + (i < total % count) for i in range(count)]
    if rows != even:
        return None
    if assigned_by == "Maximum":  # ids in a row lie in one part
        return np.arange(total)
    starts = np.concatenate([[0], np.cumsum(rows)])
    ids = np.arange(total)
    return starts[ids % count] + ids // count
