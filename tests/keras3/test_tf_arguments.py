"""TensorFlow's functions in a user's layer: no argument is left out in silence."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import kquant

LOST = {
    "preserve_aspect_ratio": lambda x: tf.image.resize(x, [6, 4], preserve_aspect_ratio=True),
    "epsilon": lambda x: tf.math.l2_normalize(x, axis=-1, epsilon=0.5),
    "data_format": lambda x: tf.nn.bias_add(x, tf.ones(4), data_format="NCHW"),
}
READ = {
    "pad": lambda x: tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=1.0),
    "adjoint": lambda x: tf.linalg.matmul(x, x, adjoint_b=True),
    "bias": lambda x: tf.nn.bias_add(x, [1.0, 2.0, 3.0, 4.0], data_format="NHWC"),
    "depth_to_space": lambda x: tf.nn.depth_to_space(x, 2),
}


def model_of(function):
    class Own(keras.layers.Layer):
        def call(self, x):
            return function(x)

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.own = keras.layers.Conv2D(4, 1), Own(name="own")

        def call(self, x):
            return self.own(self.conv(x))

    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).uniform(-1, 1, (16, 4, 4, 4)).astype("float32")
    model = Net()
    return model, x, np.asarray(model(x))


@pytest.mark.parametrize("argument", LOST)
def test_an_argument_that_keras_lacks_is_refused_by_its_name(argument):
    model, x, _ = model_of(LOST[argument])
    with pytest.raises(kquant.KQuantError, match=f"'own'.*not read with {argument}"):
        kquant.quantize_model(model, calibration_data=x)


@pytest.mark.parametrize("name", READ)
def test_an_argument_that_is_read_gives_what_it_gave(name):
    model, x, wanted = model_of(READ[name])
    given = np.asarray(kquant.quantize_model(model, calibration_data=x)(x))
    # Two 8-bit roundings, of the convolution and of what is made of it, at up to four products: a few steps of 255.
    np.testing.assert_allclose(given, wanted, atol=0.05 * float(np.ptp(wanted)))
