"""Functions as tables: the output code of every input code, computed by the trained op."""

from __future__ import annotations

import numpy as np

from kquant.core.affine import Affine
from kquant.core.errors import RangeError, UnsupportedError
from kquant.core.fold import check_finite
from kquant.core.graph import Op

LARGEST_TABLE = 2**22  # bytes


def function_table(op: Op, source: Affine, target: Affine) -> np.ndarray:
    """The 256 output codes of an elementwise op, from input code -128 on, computed by the trained op in float32."""
    values = source.dequantize(np.arange(-128, 128, dtype=np.int8))
    result = np.asarray(op.call([values])[0], np.float32)
    if np.isnan(result[source.qmin + 128 :]).any():
        raise RangeError(
            f"tensor {op.output!r}",
            f"the function of {op.layer!r} must be finite over its input range",
            "NaN",
            "Restrict its input, or leave the layer in float with `exclude`",
        )
    return target.quantize(np.nan_to_num(result))


def slope_table(op: Op, source: Affine, target: Affine) -> tuple[np.ndarray, tuple[int, ...]]:
    """PReLU as one table per slope, one behind the other, and the shape in which the slopes broadcast."""
    codes, scale = (np.asarray(a, np.float32) for a in op.attrs["codes"]())
    slopes = codes * scale
    check_finite(op, slope=slopes)
    if slopes.size * 256 > LARGEST_TABLE:
        raise UnsupportedError(
            f"layer {op.layer!r} ({op.type_name})",
            "its slopes must be few enough for a table of each",
            f"{slopes.size} slopes",
            "Share them over the spatial axes (shared_axes=[1, 2])",
        )
    values = source.dequantize(np.arange(-128, 128, dtype=np.int8))
    results = np.where(values > 0, values, slopes.reshape(-1, 1) * values)
    return target.quantize(results).reshape(-1), slopes.shape
