"""A file that is not the trained model: one number changed in it, and `verify` says so and names the op."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.tflite.flatbuffer import FileModel, FileOp, decode, encode

X = np.random.default_rng(0).normal(size=(24, 8, 8, 4)).astype(np.float32)
WEIGHTS = {"first": "norm", "second": "second_activation", "up": "up", "head": "head"}  # layer: the op in the file


@pytest.fixture(scope="module", params=[8, 4], ids=["int8", "int4"])
def trained(request, tmp_path_factory) -> tuple[keras.Model, FileModel, Any]:
    """A quantized model with each kind of kernel, its file, and where to write changed ones."""
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 4), name="x")
    y = layers.BatchNormalization(name="norm")(layers.Conv2D(6, 3, name="first")(x))
    y = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="second")(y)
    y = layers.Conv2DTranspose(5, 2, name="up")(layers.Add(name="sum")([y, layers.Conv2D(6, 3, name="side")(x)]))
    model = keras.Model(x, layers.Dense(3, name="head")(layers.Flatten(name="flat")(y)))
    rng = np.random.default_rng(1)
    for name in ("first", "second", "side", "up", "head"):
        bias = model.get_layer(name).bias
        bias.assign(rng.normal(0, 0.3, bias.shape))
    model.get_layer("norm").gamma.assign(rng.normal(size=6))
    config = [{"q_bits": {"weight": request.param, "output": 8}, "op_types": ["default"]}]
    qmodel = kquant.quantize_model(model, config, calibration_data=X)
    path = tmp_path_factory.mktemp("verify") / "model.tflite"
    kquant.export_tflite(qmodel, path)
    return qmodel, decode(path.read_bytes()), path.with_name("changed.tflite")


def index(file: FileModel, name: str) -> int:
    (found,) = [i for i, t in enumerate(file.tensors) if t.name == name]
    return found


def with_tensor(file: FileModel, tensor: str, **changes: Any) -> FileModel:
    tensors = list(file.tensors)
    at = index(file, tensor)
    tensors[at] = dataclasses.replace(tensors[at], **changes)
    return dataclasses.replace(file, tensors=tensors)


def problems(trained, file: FileModel) -> str:
    """What verify finds in a changed file, in one text; an error counts as well."""
    qmodel, _, path = trained
    path.write_bytes(encode(file))
    try:
        report = kquant.verify(qmodel, path, X)
    except kquant.KQuantError as error:
        return str(error)
    assert report.ok == (not report.problems)
    return "\n".join(report.problems)


def test_the_file_as_written_is_as_trained(trained):
    """Decoding and encoding alone change nothing, so that what the other tests find is their own change."""
    assert problems(trained, trained[1]) == ""


@pytest.mark.parametrize("layer", WEIGHTS)
@pytest.mark.parametrize("element", [0, -1])
def test_one_weight_code(layer, element, trained):
    file = trained[1]
    kernel = file.tensors[index(file, f"{WEIGHTS[layer]}/kernel")]
    data = kernel.data.copy()
    data.flat[element] += -1 if data.flat[element] > 0 else 1
    assert f"op {WEIGHTS[layer]!r}: the kernel" in problems(trained, with_tensor(file, kernel.name, data=data))


@pytest.mark.parametrize("layer", WEIGHTS)
def test_one_bias_code(layer, trained):
    file = trained[1]
    bias = file.tensors[index(file, f"{WEIGHTS[layer]}/bias")]
    data = bias.data.copy()
    data[-1] += 1
    found = problems(trained, with_tensor(file, bias.name, data=data))
    assert f"op {WEIGHTS[layer]!r}: the bias of channel {data.size - 1}" in found


@pytest.mark.parametrize("layer", WEIGHTS)
def test_one_weight_scale(layer, trained):
    """One part in a hundred thousand, which no accuracy would show."""
    file = trained[1]
    kernel = file.tensors[index(file, f"{WEIGHTS[layer]}/kernel")]
    scale = kernel.scale.copy()
    scale[1] *= np.float32(1 + 1e-5)
    found = problems(trained, with_tensor(file, kernel.name, scale=scale))
    assert f"op {WEIGHTS[layer]!r}: the kernel of channel 1" in found


@pytest.mark.parametrize("tensor", ["x/quantized", "norm", "second_activation", "sum", "up", "head"])
def test_one_activation_scale(tensor, trained):
    file = trained[1]
    scale = np.nextafter(file.tensors[index(file, tensor)].scale, np.float32(np.inf))
    assert f"tensor {tensor!r}: scale" in problems(trained, with_tensor(file, tensor, scale=scale))


@pytest.mark.parametrize("tensor", ["x/quantized", "norm", "sum", "up", "head"])
def test_one_zero_point(tensor, trained):
    file = trained[1]
    zero_point = file.tensors[index(file, tensor)].zero_point + 1
    assert f"tensor {tensor!r}: scale and zero point" in problems(
        trained, with_tensor(file, tensor, zero_point=zero_point)
    )


def test_every_activation_tensor_is_compared(trained):
    """No integer tensor of a layer's output escapes, whichever it is."""
    file = trained[1]
    computed = {i for op in file.ops for i in op.outputs}
    missed = []
    for i in sorted(computed):
        tensor = file.tensors[i]
        if tensor.scale is not None and "/" not in tensor.name.removeprefix("x/"):
            if not problems(trained, with_tensor(file, tensor.name, zero_point=tensor.zero_point + 1)):
                missed.append(tensor.name)
    assert missed == []


def rewired(file: FileModel, change: Any) -> FileModel:
    return dataclasses.replace(file, ops=[change(op) for op in file.ops])


def test_two_tensors_swapped(trained):
    """The names of two tensors of the same shape exchanged: each holds what the other should."""
    file = trained[1]
    one, other = index(file, "norm"), index(file, "second_activation")
    tensors = list(file.tensors)
    tensors[one], tensors[other] = (
        dataclasses.replace(tensors[a], name=tensors[b].name) for a, b in ((one, other), (other, one))
    )
    found = problems(trained, dataclasses.replace(file, tensors=tensors))
    assert "'norm'" in found
    assert "'second_activation'" in found


def test_an_op_that_reads_another_tensor(trained):
    """The add reads one operand twice: every tensor's parameters are right, and only the computation is not."""
    file = trained[1]
    right, wrong = index(file, "second_activation"), index(file, "norm")

    def change(op: FileOp) -> FileOp:
        if op.opcode != "ADD":
            return op
        return dataclasses.replace(op, inputs=tuple(wrong if i == right else i for i in op.inputs))

    found = problems(trained, rewired(file, change))
    assert "op 'sum' (add): max_lsb" in found
    assert "'up'" not in found  # the ops behind it still do to their own inputs what was trained


def test_another_setting_of_an_op(trained):
    """A ReLU fused into an op that was trained without one."""
    file = trained[1]
    norm = index(file, "norm")

    def change(op: FileOp) -> FileOp:
        if norm not in op.outputs:
            return op
        return dataclasses.replace(op, options=(op.options[0], {**op.options[1], "fusedActivationFunction": 1}))

    found = problems(trained, rewired(file, change))
    assert "op 'norm' (conv2d): max_lsb" in found
    assert "'second_activation'" not in found


def test_a_tensor_of_the_plan_without_a_counterpart(trained):
    assert "'sum'" in problems(trained, with_tensor(trained[1], "sum", name="total"))
