"""A trainable array as an operand of a sum, a difference or a product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.constants import on_grid
from kquant.keras_common.generation import Call
from kquant.keras_common.handlers import reads_own
from kquant.keras_common.layers import Stateful
from kquant.keras_common.reader import Reader
from kquant.tf_numerics import straight_through, xp

KINDS = {"add": tf.add, "sub": tf.subtract, "mul": tf.multiply}


class OperandBase(Stateful):
    """`x + v`, `x - v` or `x * v` with a trainable array `v`: positional embeddings, scales of a layer.

    Where the artifact computes it in 8 bits, `v` is fake-quantized on the grid on which the artifact holds it,
    `kquant.core.constants.on_grid`; the gradient is passed straight through the rounding.

    Args:
        kind: `"add"`, `"sub"` or `"mul"`.
        shape: of `v`, which broadcasts against `x` without its batch.
        first: `v` is the first operand.
        held: fake-quantize it.
    """

    def __init__(self, kind: str, shape: Sequence[int], first: bool = False, held: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.kind, self.array_shape, self.first, self.held = kind, tuple(shape), first, held

    def build(self, input_shape: Any) -> None:
        self.array = self.add_weight(name="array", shape=self.array_shape, initializer="zeros", **self.without_autocast)
        self.built = True

    def call(self, x: Any, held: bool | None = None) -> Any:
        v = tf.convert_to_tensor(self.array)
        if self.held if held is None else held:
            v = straight_through(v, tf.stop_gradient(on_grid(v, xp)))
        v = tf.cast(v, x.dtype)
        return KINDS[self.kind](v, x) if self.first else KINDS[self.kind](x, v)

    def get_config(self) -> dict:
        own = {"kind": self.kind, "shape": list(self.array_shape), "first": self.first, "held": self.held}
        return {**super().get_config(), **own}


@reads_own("TrainedOperand")
def read_operand(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """The array is a constant operand, with its values of now."""
    constant = r.constant(np.asarray(layer.array, np.float32).reshape(layer.array_shape or (1,)), layer.name)
    operands = [constant, inputs[0]] if layer.first else [inputs[0], constant]
    at = operands.index(inputs[0])

    def run(values: Any, float_weights: bool = False) -> list[Any]:
        return [layer(tf.convert_to_tensor(values[at]), held=layer.held and not float_weights)]

    return r.add(layer.kind, layer, operands, [call.shape], r.clone(layer), call=run)
