"""`export_state`: everything that a quantized model trained, as plain arrays for other runtimes."""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.core.affine import bias_codes
from kquant.tflite.export import integer_model


def export_state(qmodel: Any, *, inputs: Any = None, outputs: Any = None) -> dict[str, np.ndarray]:
    """All codes, scales and zero points of a trained quantized model, as they were trained.

    Args:
        qmodel: a model from `quantize_model` or a quantizer, or a session on a graph that one rewrote.
        inputs, outputs: of a TensorFlow 1 graph, as in `export_tflite`.

    Returns:
        A flat dict, ready for `numpy.savez`. For a tensor `t` of the plan `t/scale` (float32, shape ()), `t/zero_point`
        (int32, shape ()) and `t/bits`; for an op with weights also `t/kernel/codes` (int8, in the layer's own layout),
        `t/kernel/scale` (float32, one per output channel), `t/bias/codes` (int32) and `t/bias/scale`; for a
        tabulated function `t/table` (int8, shape (256,), from input code -128 on).

    Raises:
        ModelError: a float model. ExportError: ranges that were never set. RangeError: see `export_tflite`.

    Example:
        >>> state = kquant.export_state(qmodel)  # doctest: +SKIP
        >>> numpy.savez("model.npz", **state)  # doctest: +SKIP
    """
    model = integer_model(qmodel, inputs, outputs)
    state: dict[str, np.ndarray] = {}
    for tensor in model.tensors.values():
        if tensor.affine is not None:
            state[f"{tensor.id}/scale"] = np.asarray(tensor.affine.scale, np.float32)
            state[f"{tensor.id}/zero_point"] = np.asarray(tensor.affine.zero_point, np.int32)
            state[f"{tensor.id}/bits"] = np.asarray(tensor.affine.bits, np.int32)
        if tensor.constant is not None:
            state[f"{tensor.id}/codes"] = tensor.constant
    for op in model.ops:
        if op.table is not None:
            state[f"{op.id}/table"] = op.table
        if op.weight is not None:
            state[f"{op.id}/kernel/codes"] = op.weight.codes
            state[f"{op.id}/kernel/scale"] = op.weight.scale
        if op.weight is not None and op.weight.bias.size:
            source = model.tensors[op.inputs[0]].affine
            codes, unit = bias_codes(op.weight.bias, source, op.weight.scale)
            state[f"{op.id}/bias/codes"], state[f"{op.id}/bias/scale"] = codes, unit
    return state
