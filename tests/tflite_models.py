"""Small integer models written by hand, and what they must compute, derived in numpy from the definition alone."""

import numpy as np

from kquant.tflite.flatbuffer import FileModel, FileOp, FileTensor

CONV = ("Conv2DOptions", {"padding": 0, "strideW": 1, "strideH": 1, "fusedActivationFunction": 1})
ADD = ("AddOptions", {"fusedActivationFunction": 0})
FC = ("FullyConnectedOptions", {"fusedActivationFunction": 0})
X, C, Y = (0.05, 3), (0.1, -5), (0.12, 1)  # (scale, zero point) of the input, the conv and the sum
FC_W = 0.237


def affine(name, shape, pair, dtype="int8", signature=None, **more):
    scale, zero_point = (np.array([v]) for v in pair)
    return FileTensor(name, shape, dtype, None, scale.astype(np.float32), zero_point, 0, signature, **more)


def constant(name, data, dtype=None, scale=None, axis=0):
    data = np.asarray(data)
    scale = None if scale is None else np.asarray(scale, np.float32).reshape(-1)
    zero = None if scale is None else np.zeros(scale.size, np.int64)
    return FileTensor(name, data.shape, dtype or data.dtype.name, data, scale, zero, axis)


def conv_weights():
    rng = np.random.default_rng(7)
    w = rng.integers(-127, 128, (2, 3, 3, 2)).astype(np.int8)
    return w, np.array([0.002, 0.004], np.float32), np.array([300, -200], np.int32)


def conv_add(batch=1, dynamic=False, boundary="int8", metadata=None):
    """conv 3x3 with ReLU, then an add of the input: `x` -> `conv` -> `sum`, NHWC 4x4x2."""
    w, sw, b = conv_weights()
    shape = (batch, 4, 4, 2)
    sig = (-1, 4, 4, 2) if dynamic else None
    tensors = [
        affine("x", shape, X, signature=sig),
        constant("w", w, scale=sw),
        constant("b", b, scale=sw * np.float32(X[0])),
        affine("conv", shape, C, signature=sig),
        affine("sum", shape, Y, signature=sig),
    ]
    ops = [FileOp("CONV_2D", (0, 1, 2), (3,), 3, CONV), FileOp("ADD", (3, 0), (4,), 2, ADD)]
    inputs, outputs = (0,), (4,)
    if boundary == "float32":
        tensors += [FileTensor(n, shape, "float32", signature=sig) for n in ("x_float", "y_float")]
        ops = [FileOp("QUANTIZE", (5,), (0,)), *ops, FileOp("DEQUANTIZE", (4,), (6,), 2)]
        inputs, outputs = (5,), (6,)
    return FileModel(tensors, ops, inputs, outputs, ("image",), ("score",), metadata or {}, "by hand")


def fc_int4(batch=1, dynamic=True):
    """A dense layer 5 -> 3 with int4 weights: 15 codes, so that the last byte is half empty."""
    w = np.array([[-7, 7, 1, 0, -1], [3, -2, 5, 6, -6], [2, 2, -3, 4, 7]], np.int8)
    sig = (lambda n: (-1, n)) if dynamic else (lambda n: None)
    tensors = [
        affine("x", (batch, 5), X, signature=sig(5)),
        constant("w", w, "int4", scale=FC_W),
        constant("b", np.array([10, -20, 30], np.int32), scale=FC_W * X[0]),
        affine("y", (batch, 3), C, signature=sig(3)),
    ]
    return FileModel(tensors, [FileOp("FULLY_CONNECTED", (0, 1, 2), (3,), 10, FC)], (0,), (3,), ("x",), ("y",))


def two_inputs(batch=2):
    """`a + b` and `a * b` on float32, both outputs, with a fixed batch."""
    tensors = [FileTensor(n, (batch, 3), "float32") for n in ("ta", "tb", "tsum", "tproduct")]
    ops = [
        FileOp("ADD", (0, 1), (2,), 1, ADD),
        FileOp("MUL", (0, 1), (3,), 1, ("MulOptions", {"fusedActivationFunction": 0})),
    ]
    return FileModel(tensors, ops, (0, 1), (2, 3), ("a", "b"), ("plus", "times"))


def quantize(x, pair):
    codes = np.floor(np.float64(x) / np.float64(np.float32(pair[0])) + 0.5) + pair[1]
    return np.clip(codes, -128, 127).astype(np.int8)


def exact_conv(codes):
    """The conv's codes before rounding, after the ReLU and the clamp, from the definition in 64 bits."""
    w, sw, b = conv_weights()
    x = np.pad(codes.astype(np.int64) - X[1], ((0, 0), (1, 1), (1, 1), (0, 0)))
    acc = np.zeros((*codes.shape[:3], 2), np.int64)
    for i in range(3):
        for j in range(3):
            acc += np.einsum("nhwc,oc->nhwo", x[:, i : i + 4, j : j + 4], w[:, i, j].astype(np.int64))
    real = (acc + b) * (np.float64(np.float32(X[0])) * sw.astype(np.float64))
    return np.clip(np.maximum(real, 0) / np.float64(np.float32(C[0])) + C[1], -128, 127)


def exact_sum(conv, x):
    real = (conv.astype(np.float64) - C[1]) * C[0] + (x.astype(np.float64) - X[1]) * X[0]
    return np.clip(real / Y[0] + Y[1], -128, 127)


def exact_fc(codes, model):
    w, b = (model.tensors[i].data.astype(np.int64) for i in (1, 2))
    real = ((codes.astype(np.int64) - X[1]) @ w.T + b) * (X[0] * FC_W)
    return np.clip(real / C[0] + C[1], -128, 127)
