"""Float ops that the user allowed: each is converted by the TensorFlow converter and spliced into the file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kquant.core.errors import ExportError
from kquant.core.integer import IntOp
from kquant.tflite.emit import Emitter, lowers
from kquant.tflite.flatbuffer import FileModel, decode


def converted(op: IntOp, specs: list[tuple[Any, str]], constants: list[Any]) -> FileModel:
    """A trained op as a float TFLite graph.

    Args:
        op: the op.
        specs: shape and dtype of each input that is computed.
        constants: of all its inputs the value, or None for those.

    Raises:
        ExportError: an op that the converter cannot write in builtin ops without control flow.
    """
    import tensorflow as tf

    (part,) = op.parts
    signature = [tf.TensorSpec(shape, dtype) for shape, dtype in specs]

    @tf.function(input_signature=signature, autograph=False)
    def function(*values: Any) -> list[Any]:
        computed = iter(values)
        inputs = [next(computed) if c is None else tf.constant(c) for c in constants]
        return [tf.identity(y) for y in part.call(inputs)]

    try:
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], function)
        file = decode(converter.convert(), part.layer)
    except Exception as error:
        raise ExportError(
            f"layer {part.layer!r} ({part.type_name})",
            "a float op that TFLite has as a builtin",
            str(error).strip().splitlines()[0][:200],
            "Replace the layer, or cut it off before the export",
        ) from error
    if file.other_subgraphs:
        raise ExportError(
            f"layer {part.layer!r} ({part.type_name})",
            "a float op without control flow",
            "a loop in its graph",
            "Build a recurrent layer with unroll=True",
        )
    return file


@lowers("float")
def _float(e: Emitter, op: IntOp) -> None:
    reads = [t for t in op.inputs if e.model.tensors[t].constant is None]
    constants = [e.model.tensors[t].constant for t in op.inputs]
    file = converted(op, [(e.shape(t), e.model.tensors[t].dtype) for t in reads], constants)
    given = dict(zip(file.inputs, map(e.tensor, reads), strict=True))
    made = dict(zip(file.outputs, map(e.tensor, op.outputs), strict=True))
    table = {-1: -1, **given, **made}
    for index, tensor in enumerate(file.tensors):
        if index not in table:
            e.tensors.append(replace(tensor, name=f"{op.id}/{tensor.name}"))
            table[index] = len(e.tensors) - 1
    for step in file.ops:
        e.ops.append(
            replace(step, inputs=tuple(table[i] for i in step.inputs), outputs=tuple(table[i] for i in step.outputs))
        )
