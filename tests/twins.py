"""Random small image nets as plain data, which Keras and torch build from the same weights: twins.

Shapes and arrays are channels-last, kernels (h, w, in, out); the torch twin transposes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

COUNT, SIDE, CHANNELS, CLASSES, SAMPLES = 24, 8, 3, 5, 3
HEAD = 98  # the step of the dense layer, for its arrays
CONFIGS = (
    [{"q_bits": 8, "op_types": ["default"]}],
    [{"q_bits": 4, "op_types": ["default"]}],
    [{"q_bits": {"weight": 3, "output": 6}, "op_types": ["default"], "quantizer": "naive"}],
    [{"q_bits": {"weight": 2, "output": 4}, "op_types": ["default"], "quantizer": "dorefa"}],
)
ACTIVATIONS = ("relu", "relu6", "sigmoid", "tanh", "silu", "elu")


@dataclass(frozen=True)
class Step:
    """One layer: tensor 0 is the input, tensor i + 1 the output of step i."""

    kind: str
    inputs: tuple[int, ...]
    shape: tuple[int, int, int]
    args: tuple[Any, ...] = ()


def steps(index: int) -> list[Step]:
    """The layers of net `index`, without its head: a global average and a dense layer."""
    r = np.random.default_rng((20180715, index))
    made = [Step("conv", (0,), (SIDE, SIDE, 6), (3, 1, 6)), Step("activation", (1,), (SIDE, SIDE, 6), ("relu",))]
    shapes = [(SIDE, SIDE, CHANNELS), *(s.shape for s in made)]
    for _ in range(int(r.integers(5, 9))):
        x = int(r.integers(max(len(shapes) - 3, 1), len(shapes)))
        height, width, channels = shape = shapes[x]
        alike = [i for i in range(1, len(shapes)) if shapes[i] == shape]
        kinds = ["conv", "conv", "depthwise", "norm", "activation", "activation", "scale", "shift"]
        kinds += ["add", "mul", "concat"] * (len(alike) > 1) + ["max_pool", "average_pool"] * (height >= 4)
        kind, inputs, args = str(r.choice(kinds)), (x,), ()
        if kind == "conv":
            groups = int(r.choice([g for g in (1, 1, 2) if channels % g == 0]))
            filters = 2 * int(r.integers(2, 5))
            shape, args = (height, width, filters), (int(r.choice([1, 3])), groups, filters)
        elif kind == "activation":
            args = (str(r.choice(ACTIVATIONS)),)
        elif kind == "scale":
            args = (float(r.choice([0.5, -1.25, 3.0])),)
        elif kind in ("add", "mul", "concat"):
            inputs = (x, int(r.choice([i for i in alike if i != x])))
            shape = (height, width, 2 * channels) if kind == "concat" else shape
        elif kind in ("max_pool", "average_pool"):
            shape = (height // 2, width // 2, channels)
        made.append(Step(kind, inputs, shape, args))
        shapes.append(shape)
    return made


def array(index: int, step: int, role: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a step; kernels have a dead channel now and then."""
    r = np.random.default_rng((index, step, *role.encode()))
    values = r.normal(0, 1, shape)
    if role == "kernel":
        values *= np.sqrt(2 / np.prod(shape[:-1])) * (r.random(shape[-1:]) > 0.05)
    values = np.exp(values / 2) if role == "variance" else 0.5 + values / 4 if role == "gamma" else values
    return (values if role in ("kernel", "variance", "gamma") else 0.3 * values).astype(np.float32)


NORM = ("gamma", "beta", "mean", "variance")


def images(index: int) -> np.ndarray:
    """The input of net `index`."""
    r = np.random.default_rng((4, index))
    return r.normal(size=(SAMPLES, SIDE, SIDE, CHANNELS)).astype(np.float32)


def in_keras(index: int) -> tuple[Any, dict[str, int]]:
    """The net in Keras 3, and the step that each of its layers and operations is; the head's are -1."""
    import keras
    from keras import layers, ops

    tensors = [keras.Input((SIDE, SIDE, CHANNELS), name="x")]
    weights: list[tuple[Any, list[np.ndarray]]] = []
    names = {"x": 0}

    def layer(made: Any, arrays: list[np.ndarray], x: Any) -> Any:
        weights.append((made, arrays))
        return made(x)

    for at, step in enumerate(steps(index)):
        x, *others = (tensors[i] for i in step.inputs)
        channels, args = x.shape[-1], step.args
        if step.kind == "conv":
            size, groups, filters = args
            shape = (size, size, channels // groups, filters)
            arrays = [array(index, at, "kernel", shape), array(index, at, "bias", (filters,))]
            y = layer(layers.Conv2D(filters, size, padding="same", groups=groups), arrays, x)
        elif step.kind == "depthwise":
            arrays = [array(index, at, "kernel", (3, 3, channels, 1)), array(index, at, "bias", (channels,))]
            y = layer(layers.DepthwiseConv2D(3, padding="same"), arrays, x)
        elif step.kind == "norm":
            arrays = [array(index, at, role, (channels,)) for role in NORM]
            y = layer(layers.BatchNormalization(epsilon=1e-5), arrays, x)
        elif step.kind == "activation":
            y = layers.ReLU(6.0)(x) if args[0] == "relu6" else layers.Activation(args[0])(x)
        elif step.kind in ("max_pool", "average_pool"):
            y = (layers.MaxPooling2D if step.kind == "max_pool" else layers.AveragePooling2D)(2)(x)
        elif step.kind == "scale":
            y = x * args[0]
        elif step.kind == "shift":
            y = x + array(index, at, "shift", (1, *step.shape))
        else:
            y = {"add": ops.add, "mul": ops.multiply, "concat": lambda a, b: ops.concatenate([a, b], -1)}[step.kind](
                x, *others
            )
        tensors.append(y)
        names[y._keras_history.operation.name] = at + 1
    pooled = layers.GlobalAveragePooling2D()(tensors[-1])
    arrays = [array(index, HEAD, "kernel", (pooled.shape[-1], CLASSES)), array(index, HEAD, "bias", (CLASSES,))]
    model = keras.Model(tensors[0], layer(layers.Dense(CLASSES), arrays, pooled))
    for made, arrays in weights:
        made.set_weights(arrays)
    return model, names


def in_torch(index: int) -> Any:
    """The net in torch, in evaluation mode."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import nn

    def tensor(at: int, role: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = array(index, at, role, shape)
        return torch.from_numpy(values.transpose(3, 2, 0, 1).copy() if values.ndim == 4 else values)

    functions = {
        "relu": F.relu, "relu6": F.relu6, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu, "elu": F.elu,
        "add": torch.add, "mul": torch.mul, "concat": lambda a, b: torch.cat([a, b], 1),
        "max_pool": lambda x: F.max_pool2d(x, 2), "average_pool": lambda x: F.avg_pool2d(x, 2),
    }  # fmt: skip

    class Do(nn.Module):
        """A step without a layer of torch's."""

        def __init__(self, step, shift):
            super().__init__()
            self.kind, self.args = step.kind, step.args
            if step.kind == "shift":
                self.register_buffer("shift", torch.from_numpy(shift.transpose(0, 3, 1, 2).copy()))

        def forward(self, x, *others):
            if self.kind == "scale":
                return x * self.args[0]
            if self.kind == "shift":
                return x + self.shift
            return functions[self.args[0] if self.kind == "activation" else self.kind](x, *others)

    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = steps(index)
            shapes = [(SIDE, SIDE, CHANNELS), *(s.shape for s in self.steps)]
            for at, step in enumerate(self.steps):
                made, state = self.made(at, step, shapes[step.inputs[0]][-1])
                made.load_state_dict({**made.state_dict(), **state})
                self.add_module(f"step{at + 1}", made)
            self.head = nn.Linear(shapes[-1][-1], CLASSES)
            kernel = torch.from_numpy(array(index, HEAD, "kernel", (shapes[-1][-1], CLASSES)).T.copy())
            self.head.load_state_dict({"weight": kernel, "bias": tensor(HEAD, "bias", (CLASSES,))})

        @staticmethod
        def made(at, step, channels):
            if step.kind == "conv":
                size, groups, filters = step.args
                shape = (size, size, channels // groups, filters)
                state = {"weight": tensor(at, "kernel", shape), "bias": tensor(at, "bias", (filters,))}
                return nn.Conv2d(channels, filters, size, padding=size // 2, groups=groups), state
            if step.kind == "depthwise":
                kernel = array(index, at, "kernel", (3, 3, channels, 1)).transpose(2, 3, 0, 1).copy()
                state = {"weight": torch.from_numpy(kernel), "bias": tensor(at, "bias", (channels,))}
                return nn.Conv2d(channels, channels, 3, padding=1, groups=channels), state
            if step.kind == "norm":
                names = ("weight", "bias", "running_mean", "running_var")
                state = {n: tensor(at, role, (channels,)) for n, role in zip(names, NORM, strict=True)}
                return nn.BatchNorm2d(channels), state
            return Do(step, array(index, at, "shift", (1, *step.shape))), {}

        def forward(self, x):
            tensors = [x]
            for at, step in enumerate(self.steps):
                tensors.append(getattr(self, f"step{at + 1}")(*(tensors[i] for i in step.inputs)))
            return self.head(tensors[-1].mean((2, 3)))

    return Twin().eval()
