"""The integer model: what every exporter writes and `export_state` hands over. Plain frozen data, framework-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kquant.core.affine import Affine
from kquant.core.graph import Op, Shape


@dataclass(frozen=True)
class IntTensor:
    """A tensor: its shape, dtype, quantization (None for ids and float tensors) and constant codes or values."""

    id: str
    shape: Shape
    dtype: str
    affine: Affine | None = None
    constant: np.ndarray | None = None


@dataclass(frozen=True)
class IntWeight:
    """Weight codes in the neutral layout, the scale of each output channel (or one), and the bits they are stored in.

    Args:
        codes: int8, the shape of the float kernel.
        scale: float32, one per output channel, or of size 1.
        storage_bits: 4 or 8.
        bias: float64 values of the bias with the batch norm folded in, one per output channel.
        per_tensor: the scales of all channels are one.
    """

    codes: np.ndarray
    scale: np.ndarray
    storage_bits: int
    bias: np.ndarray
    per_tensor: bool = False


@dataclass(frozen=True)
class IntOp:
    """One op of the integer model.

    Args:
        id: the id of the tensor it produces, which names it in the artifact.
        kind: a row of the operator table, or `requantize`, `table`, `clamp`, `quantize`, `dequantize`, `float`.
        inputs, outputs: tensor ids.
        attrs: the op's settings.
        weight: the kernel, for a weighted op.
        relu: whether a ReLU is fused; with an upper limit or None.
        table: for `table`, the 256 output codes, from input code -128 on.
        parts: the trained ops that it computes, for verification.
    """

    id: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    weight: IntWeight | None = None
    relu: bool = False
    relu_max: float | None = None
    table: np.ndarray | None = None
    parts: tuple[Op, ...] = ()


@dataclass(frozen=True)
class IntegerModel:
    """The whole model: its signature, why ops stayed float, and for each trained tensor the one here (`bound`)."""

    ops: tuple[IntOp, ...]
    tensors: Mapping[str, IntTensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    floats: Mapping[str, str]
    bound: Mapping[str, str]
    name: str = "model"
