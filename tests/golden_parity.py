"""One set of weights and ranges for every framework, and the golden file of the codes that they give.

The file was written by Keras 3: `python -m golden_parity` in `tests`, in the TensorFlow environment, writes it anew.
Arrays are channels-last, kernels (h, w, in, out).
"""

from __future__ import annotations

import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent / "golden_parity.npz"
WEIGHTS = [("qat", 8), ("qat", 4), ("qat", 2), ("naive", 8), ("dorefa", 1), ("dorefa", 2), ("dorefa", 4), ("dorefa", 8)]
RANGES = [(0.0, 6.0, 8), (-1.3, 2.1, 8), (-0.4, 3.0, 4), (0.0, 1.0, 2), (0.0, 0.7, 1), (-5.0, 0.25, 3)]
CHANNELS = 6


def kernel() -> np.ndarray:
    """A convolution kernel with a dead channel and a nearly dead one."""
    w = np.random.default_rng(1).normal(size=(3, 3, 4, CHANNELS)).astype(np.float32)
    w[..., 2] = 0
    w[..., 3] *= 1e-6
    return w


def values() -> np.ndarray:
    """Activations, some of them exactly halfway between codes of the first range."""
    x = np.random.default_rng(2).normal(size=1000).astype(np.float32) * 2
    x[:50] = (np.arange(50, dtype=np.float32) + 0.5) * np.float32(6 / 255)
    return x


def net_weights() -> dict[str, np.ndarray]:
    """Parameters of a net: conv, batch norm, ReLU, plus a grouped convolution, mean, dense."""
    r = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return r.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[:-1])))

    return {
        "stem": normal(3, 3, 3, 8), "gamma": r.uniform(0.5, 2, 8).astype(np.float32),
        "beta": r.normal(size=8).astype(np.float32), "mean": r.normal(size=8).astype(np.float32) * 0.1,
        "variance": r.uniform(0.5, 2, 8).astype(np.float32), "branch": normal(3, 3, 4, 8),
        "branch_bias": r.normal(size=8).astype(np.float32), "head": normal(8, 5),
        "head_bias": r.normal(size=5).astype(np.float32),
    }  # fmt: skip


def net_input() -> np.ndarray:
    """Images for the net, (n, h, w, c)."""
    return np.random.default_rng(4).normal(size=(4, 9, 9, 3)).astype(np.float32)


def collected(graph, feeds) -> tuple[list[np.ndarray], list[tuple[float, float]]]:
    """The values behind every fake quantization of a graph in order, and the ranges."""
    from kquant.core.graph import walk

    found, ranges = [], []

    def visit(op, inputs, outputs):
        if op.kind == "fake_quant":
            found.append(np.asarray(outputs[0]))
            ranges.append(tuple(float(v) for v in op.attrs["quantizer"].range()))

    walk(graph, feeds, visit)
    return found, ranges


def keras_net():
    """The net in Keras 3."""
    import keras
    from keras import layers

    p = net_weights()
    x = keras.Input((9, 9, 3), name="x")
    stem, norm = layers.Conv2D(8, 3, padding="same", use_bias=False), layers.BatchNormalization(epsilon=1e-5)
    branch, head = layers.Conv2D(8, 3, padding="same", groups=2), layers.Dense(5)
    y = layers.ReLU()(norm(stem(x)))
    y = layers.Add()([y, branch(y)])
    model = keras.Model(x, head(layers.GlobalAveragePooling2D()(y)))
    stem.set_weights([p["stem"]])
    norm.set_weights([p["gamma"], p["beta"], p["mean"], p["variance"]])
    branch.set_weights([p["branch"], p["branch_bias"]])
    head.set_weights([p["head"], p["head_bias"]])
    return model


def made_by_keras() -> dict[str, np.ndarray]:
    """The golden arrays, by Keras 3."""
    import keras

    import kquant
    from kquant import keras3
    from kquant.keras3.layers import QuantizedLayer
    from kquant.tf_numerics import fake_quantize_range

    found = {}
    for quantizer, bits in WEIGHTS:
        layer = QuantizedLayer(keras.layers.Conv2D(CHANNELS, 3), quantizer, bits)
        layer.build((None, 9, 9, 4))
        layer.layer.set_weights([kernel(), np.zeros(CHANNELS, np.float32)])
        codes, scale = (np.asarray(a) for a in layer.codes())
        found[f"{quantizer}{bits}/codes"], found[f"{quantizer}{bits}/scale"] = codes.astype(np.int16), scale
    for i, (low, high, bits) in enumerate(RANGES):
        y = fake_quantize_range(values(), np.float32(low), np.float32(high), bits)
        found[f"range{i}"] = np.asarray(y, np.float32)
    qmodel = kquant.quantize_model(keras_net(), calibration_data=net_input())
    graph = keras3.read(qmodel)
    tensors, ranges = collected(graph, {graph.inputs[0]: net_input()})
    found |= {f"net/{i}": t for i, t in enumerate(tensors)}
    found["net/ranges"] = np.array(ranges, np.float32)
    return found


if __name__ == "__main__":
    np.savez_compressed(FILE, **made_by_keras())
