"""Core's numbers and those of TensorFlow's ops are the same."""

import numpy as np
import tensorflow as tf
from constant_arrays import each_array
from hypothesis import assume, given
from hypothesis import strategies as st

from kquant.core.affine import Affine
from kquant.core.constants import on_grid
from kquant.tf_numerics import xp

SIZE = st.floats(np.float32(1e-6), np.float32(1e6), width=32)


@given(low=SIZE | st.just(0.0), high=SIZE | st.just(0.0), bits=st.integers(2, 8), data=st.data())
def test_values_are_tensorflows_fake_quantization(low, high, bits, data):
    """The op that training uses and the parameters that the artifact gets are the same numbers."""
    assume(low or high)
    values = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20)
    x = np.array(data.draw(values), np.float32) * np.float32(max(low, high))
    theirs = tf.quantization.fake_quant_with_min_max_vars(x, np.float32(-low), np.float32(high), num_bits=bits).numpy()
    affine = Affine.of_range(np.float32(-low), np.float32(high), bits)
    ours = affine.dequantize(affine.quantize(x))
    # Their float32 sum x - min and ours in float64 fall apart only on a rounding boundary.
    exact = x.astype(np.float64) / np.float64(affine.scale)
    boundary = np.abs(exact - np.floor(exact) - 0.5) < 1e-3
    np.testing.assert_allclose(np.where(boundary, 0, ours), np.where(boundary, 0, theirs), rtol=3e-7, atol=0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1.001 * float(affine.scale))


@each_array
def test_constants_are_held_as_in_core_to_the_bit(v):
    def hold(x):
        return on_grid(x, xp)

    for run in (hold, tf.function(hold), tf.function(hold, jit_compile=True)):
        np.testing.assert_array_equal(run(tf.constant(v)).numpy(), on_grid(v))
