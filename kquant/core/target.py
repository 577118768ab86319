"""A target as data: its table of operators and the few facts about its kernels that lowering depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kquant.core.int8_spec import NATIVE, OPAQUE, ROWS, Row


@dataclass(frozen=True)
class Accumulator:
    """What a kernel with weights holds between its integer sum and its output code.

    Args:
        bias_limit: the largest bias in units of `s_in * s_w`; infinite where the bias is a float.
        smallest, largest: the multipliers `s_in * s_w / s_out` that the kernel holds.
        widest: the largest weight code up to which codes of fewer bits may be spread, for a finer unit of the bias.
    """

    bias_limit: float = float("inf")
    smallest: float = 0.0
    largest: float = float("inf")
    widest: int = 0


@dataclass(frozen=True)
class Target:
    """Where an integer model runs.

    Args:
        name: as users write it.
        rows: the operator table.
        functions: elementwise functions with a kernel of their own that keeps the contract; others are tables.
        fixed_kernels: whether sigmoid and tanh have kernels of their own.
        requantize_by_kernel: an identity depthwise kernel over the last axis requantizes; else a table.
        clamps: every kernel clamps to a ReLU's limits and to the codes of a low-bit output; else clamp ops follow.
        accumulator: the limits of the kernels with weights.
    """

    name: str
    rows: Mapping[str, Row]
    functions: frozenset[str]
    fixed_kernels: bool
    requantize_by_kernel: bool
    clamps: bool
    accumulator: Accumulator

    def row(self, kind: str) -> Row:
        """The row of an op kind, or `OPAQUE`."""
        return self.rows.get(kind, OPAQUE)


# int32 biases, one bit below their limit so that they always fit; kernels hold multipliers of 2^-31 to 2^8.
TFLITE = Target(
    name="tflite",
    rows=ROWS,
    functions=frozenset(NATIVE),
    fixed_kernels=True,
    requantize_by_kernel=True,
    clamps=False,
    accumulator=Accumulator(bias_limit=2.0**30, smallest=2.0**-30, largest=2.0**8, widest=127),
)
