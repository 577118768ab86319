"""What an export can be asked for: boundaries, batches, names, float islands, weights only, 16x8, plain arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from keras_generation import keras, layers

import kquant
from kquant.core.errors import ExportError
from kquant.tflite.flatbuffer import FileModel, decode, encode

DEFAULT = {"q_bits": 8, "op_types": ["default"]}
SHAPE = (10, 10, 4)
X = np.random.default_rng(0).normal(size=(48, *SHAPE)).astype(np.float32)


def net(batch: int | None = None, seed: int = 0) -> keras.Model:
    """conv, batch norm, silu, depthwise, dense."""
    keras.utils.set_random_seed(seed)
    x = keras.Input(SHAPE, batch_size=batch, name="x")
    y = layers.BatchNormalization(name="norm")(layers.Conv2D(6, 3, name="first")(x))
    y = layers.DepthwiseConv2D(3, activation="relu6", name="second")(layers.Activation("silu", name="silu")(y))
    model = keras.Model(x, layers.Dense(5, name="head")(layers.Flatten(name="flat")(y)), name="net")
    rng = np.random.default_rng(seed)
    model.get_layer("norm").gamma.assign(rng.normal(size=6))
    model.get_layer("norm").moving_mean.assign(rng.normal(size=6))
    for name in ("first", "second", "head"):
        bias = model.get_layer(name).bias
        bias.assign(rng.normal(0, 0.3, bias.shape))
    return model


@pytest.fixture
def qmodel() -> keras.Model:
    return kquant.quantize_model(net(), calibration_data=X)


def exported(qmodel: keras.Model, path: Any, **options: Any) -> FileModel:
    kquant.export_tflite(qmodel, path, **options)
    return decode(path.read_bytes())


# -- boundaries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_type", ["float32", "int8", "uint8"])
@pytest.mark.parametrize("output_type", ["float32", "int8", "uint8"])
def test_boundary_types_change_the_type_and_no_value(input_type, output_type, qmodel, tmp_path):
    plain, path = tmp_path / "plain.tflite", tmp_path / "model.tflite"
    kquant.export_tflite(qmodel, plain)
    file = exported(qmodel, path, input_type=input_type, output_type=output_type)
    assert file.tensors[file.inputs[0]].dtype == input_type
    assert file.tensors[file.outputs[0]].dtype == output_type
    assert kquant.audit(path).fully_integer
    report = kquant.verify(qmodel, path, X[:8])
    assert report.ok, report.problems
    # load_artifact takes and gives real values, so codes on the boundary are the only thing that differs.
    np.testing.assert_array_equal(kquant.load_artifact(path)(X[:8]), kquant.load_artifact(plain)(X[:8]))
    if input_type == "uint8":
        inner = next(op.outputs[0] for op in file.ops if op.inputs[0] == file.inputs[0])
        outer, inner = file.tensors[file.inputs[0]], file.tensors[inner]
        assert (outer.scale, outer.zero_point) == (inner.scale, inner.zero_point + 128)


# -- batches ----------------------------------------------------------------------------------------------------------


def test_dynamic_batch_gives_the_same_for_every_batch_size(qmodel, tmp_path):
    file = exported(qmodel, tmp_path / "model.tflite")
    assert file.tensors[file.inputs[0]].signature == (-1, *SHAPE)
    assert file.tensors[file.outputs[0]].signature == (-1, 5)
    run = kquant.load_artifact(tmp_path / "model.tflite")
    whole = run(X)
    for size in (1, 3, 48):
        np.testing.assert_array_equal(np.concatenate([run(X[i : i + size]) for i in range(0, 48, size)]), whole)


def test_static_batch_gives_what_the_dynamic_one_gives(qmodel, tmp_path):
    static = kquant.quantize_model(net(batch=4), calibration_data=[X[i : i + 4] for i in range(0, 48, 4)])
    file = exported(static, tmp_path / "static.tflite")
    assert file.tensors[file.inputs[0]].signature is None
    assert file.tensors[file.inputs[0]].shape == (4, *SHAPE)
    assert kquant.verify(static, tmp_path / "static.tflite", X[:8]).ok
    kquant.export_tflite(qmodel, tmp_path / "dynamic.tflite")
    ours, theirs = (kquant.load_artifact(tmp_path / f"{n}.tflite")(X) for n in ("static", "dynamic"))
    np.testing.assert_array_equal(ours, theirs)


def test_an_output_without_a_name_is_called_as_in_the_float_model(qmodel, tmp_path):
    file = exported(qmodel, tmp_path / "model.tflite")
    assert (file.input_names, file.output_names) == (("x",), ("head",))


@pytest.mark.parametrize("function", ["softmax", "relu", "tanh"])
def test_an_output_with_an_activation_is_called_like_its_layer(function, tmp_path):
    """Also after saving and loading, when only the layers' names are left."""
    x = keras.Input(SHAPE, name="x")
    y = layers.Dense(3, activation=function, name="probs")(layers.Flatten()(x))
    qmodel = kquant.quantize_model(keras.Model(x, y), calibration_data=X)
    assert exported(qmodel, tmp_path / "model.tflite").output_names == ("probs",)
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert exported(loaded, tmp_path / "again.tflite").output_names == ("probs",)
    assert kquant.load_artifact(tmp_path / "again.tflite")(X[:4]).shape == (4, 3)


def test_several_inputs_and_outputs_keep_their_names(tmp_path):
    rng = np.random.default_rng(0)
    a, b = keras.Input((6,), name="left"), keras.Input((4,), name="right")
    joined = layers.Dense(3, name="sum")(layers.Concatenate()([a, b]))
    model = keras.Model({"left": a, "right": b}, {"score": joined, "share": layers.Dense(2, activation="softmax")(a)})
    data = {"left": rng.normal(size=(40, 6)).astype("f4"), "right": 3 * rng.normal(size=(40, 4)).astype("f4")}
    qmodel = kquant.quantize_model(model, calibration_data=data)
    path = tmp_path / "model.tflite"
    file = exported(qmodel, path)
    assert sorted(file.input_names) == ["left", "right"]
    assert sorted(file.output_names) == ["score", "share"]
    assert kquant.verify(qmodel, path, data).ok
    got, trained = kquant.load_artifact(path)(data), qmodel.predict(data, verbose=0)
    for name in ("score", "share"):
        step = 1 / 256 if name == "share" else np.ptp(trained[name]) / 255
        # The last rounding alone may differ: a code of the output.
        np.testing.assert_allclose(got[name], trained[name], atol=1.1 * step)


# -- float islands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("island", ["first", "silu", "second", "head"])
def test_float_island_is_refused_unless_allowed(island, tmp_path):
    config = [DEFAULT, {"op_names": [island], "exclude": True}]
    qmodel = kquant.quantize_model(net(), config, calibration_data=X)
    path = tmp_path / "model.tflite"
    with pytest.raises(ExportError, match=island):
        kquant.export_tflite(qmodel, path)
    assert not path.exists()
    report = kquant.export_tflite(qmodel, path, allow_float=True)
    assert not report.fully_integer
    assert any(name.startswith(island) for name in report.floats)
    audit = kquant.audit(path)
    assert not audit.fully_integer
    assert any(op.name.startswith(island) or island in op.name for op in audit.float_ops), audit.float_ops
    assert all(op.cause for op in audit.float_ops)
    macs = island != "silu"  # without a kernel in float, all multiply-accumulates are still integer
    assert (audit.integer_mac_fraction < 1) == macs
    parity = kquant.verify(qmodel, path, X[:16])
    assert parity.ok, parity.problems
    trained = qmodel.predict(X[:16], verbose=0)
    # The trained values, within a code of the largest output: a flipped code in the middle travels on.
    np.testing.assert_allclose(kquant.load_artifact(path)(X[:16]), trained, atol=1.5 * np.ptp(trained) / 255)


@pytest.mark.parametrize("input_type", ["float32", "int8", "uint8"])
def test_few_bits_of_an_input_are_clamped_and_compared_behind_every_boundary(input_type, tmp_path):
    entry = {"op_names": ["first"], "q_bits": {"weight": 8, "input": 4, "output": 8}}
    qmodel, path = kquant.quantize_model(net(), [DEFAULT, entry], calibration_data=X), tmp_path / "model.tflite"
    file = exported(qmodel, path, input_type=input_type)
    data = 2 * X[:8]  # beyond the calibrated range, so that the clamp has something to do
    report = kquant.verify(qmodel, path, data)
    assert report.ok, report.problems
    assert report.ops[0].codes_used <= 16 and report.ops[0].bits == 4
    # A lower bound one code higher is no longer the trained one.
    low = next(i for op in file.ops if op.opcode == "MAXIMUM" for i in op.inputs if file.tensors[i].data is not None)
    file.tensors[low] = dataclasses.replace(file.tensors[low], data=file.tensors[low].data + np.int8(1))
    path.write_bytes(encode(file))
    assert not kquant.verify(qmodel, path, data).ok


def test_integer_boundary_before_a_float_island_is_refused(tmp_path):
    qmodel = kquant.quantize_model(net(), [DEFAULT, {"op_names": ["first"], "exclude": True}], calibration_data=X)
    with pytest.raises(ExportError, match="a float op reads it"):
        kquant.export_tflite(qmodel, tmp_path / "model.tflite", allow_float=True, input_type="int8")
    assert list(tmp_path.iterdir()) == []


# -- weights only -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, X], ids=["without ranges", "calibrated"])
def test_weights_only(data, tmp_path):
    qmodel = kquant.NaiveQuantizer()(net(), calibration_data=data)
    path = tmp_path / "model.tflite"
    report = kquant.export_tflite(qmodel, path, weights_only=True)
    assert not report.fully_integer
    audit = kquant.audit(path)
    assert audit.integer_mac_fraction == 0
    file = decode(path.read_bytes())
    kernels = [t for t in file.tensors if t.data is not None and t.name.endswith("/kernel")]
    assert {t.dtype for t in kernels} == {"int8"}
    assert len(kernels) == 3
    assert kquant.verify(qmodel, path, X[:8]).ok
    # Against the float model with its kernels rounded here, from the definition: max|w| / 127 per output channel.
    model = net()
    for name, axes in (("first", (0, 1, 2)), ("second", (0, 1)), ("head", (0,))):
        kernel = model.get_layer(name).weights[0]
        w = np.asarray(kernel, np.float64)
        scale = np.abs(w).max(axis=axes, keepdims=True) / 127
        kernel.assign(np.floor(w / scale + 0.5) * scale)
    expected = model.predict(X[:8], verbose=0)
    # float32 sums in another order, and a weight on the edge between two codes
    np.testing.assert_allclose(kquant.load_artifact(path)(X[:8]), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


# -- 16x8 -------------------------------------------------------------------------------------------------------------


def test_16x8_activations_are_int16_and_finer(qmodel, tmp_path):
    wide = [{"q_bits": {"weight": 8, "output": 16}, "op_types": ["Conv2D", "DepthwiseConv2D", "BatchNormalization"]}]
    config = [DEFAULT, *wide, {"q_bits": 8, "op_names": ["head", "silu"]}]
    other = kquant.quantize_model(net(), config, calibration_data=X)
    file = exported(other, tmp_path / "wide.tflite")
    tensors = {t.name: t for t in file.tensors}
    assert kquant.audit(tmp_path / "wide.tflite").fully_integer
    assert kquant.verify(other, tmp_path / "wide.tflite", X[:16]).ok
    assert tensors["norm"].dtype == "int16"
    assert tensors["norm"].zero_point == [0]
    narrow = {t.name: t for t in exported(qmodel, tmp_path / "narrow.tflite").tensors}
    assert tensors["norm"].scale[0] < narrow["norm"].scale[0] / 100


def test_16_bits_are_refused_where_the_kernel_does_not_keep_its_bound(tmp_path):
    x = keras.Input(SHAPE)
    model = keras.Model(x, layers.Conv2DTranspose(3, 2, name="up")(x))
    config = [DEFAULT, {"q_bits": {"weight": 8, "output": 16}, "op_names": ["up"]}]
    with pytest.raises(kquant.UnsupportedError, match=r"'up'.*16-bit.*q_bits"):
        kquant.quantize_model(model, config, calibration_data=X)


# -- the same again ---------------------------------------------------------------------------------------------------


def test_same_model_same_bytes(qmodel, tmp_path):
    for name in ("one", "two"):
        kquant.export_tflite(qmodel, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    twin = kquant.quantize_model(net(), calibration_data=X)
    kquant.export_tflite(twin, tmp_path / "twin")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "twin").read_bytes()
    other = kquant.quantize_model(net(seed=1), calibration_data=X)
    kquant.export_tflite(other, tmp_path / "other")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("quantizer", ["qat", "naive", "dorefa"])
def test_save_and_load_give_the_same_bytes(quantizer, tmp_path):
    bits = {"weight": 4, "output": 8}
    config = [{"q_bits": bits, "op_types": ["default"], "quantizer": quantizer}]
    x = 0.1 * X  # DoReFa's clipping of activations above 1 would warn
    qmodel = kquant.quantize_model(net(), config, calibration_data=x)
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    kquant.export_tflite(qmodel, tmp_path / "before.tflite")
    kquant.export_tflite(loaded, tmp_path / "after.tflite")
    assert (tmp_path / "before.tflite").read_bytes() == (tmp_path / "after.tflite").read_bytes()


# -- plain arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_export_state_holds_what_the_artifact_holds(weight_bits, tmp_path):
    config = [{"q_bits": {"weight": weight_bits, "output": 8}, "op_types": ["default"]}]
    qmodel = kquant.quantize_model(net(), config, calibration_data=X)
    state = kquant.export_state(qmodel)
    tensors = {t.name: t for t in exported(qmodel, tmp_path / "model.tflite").tensors}
    quantized = {
        k.removesuffix("/scale") for k in state if k.endswith("/scale") and k.count("/") < 2 and "kernel" not in k
    }
    seen = 0
    for name in quantized - {k.removesuffix("/codes") for k in state}:
        if name in tensors and f"{name}/zero_point" in state:
            assert tensors[name].scale[0] == state[f"{name}/scale"]
            assert tensors[name].zero_point[0] == state[f"{name}/zero_point"]
            seen += 1
    assert seen >= 5
    layouts = {"norm": (3, 0, 1, 2), "second_activation": None, "head": (1, 0)}
    for name, axes in layouts.items():
        codes, kernel = state[f"{name}/kernel/codes"], tensors[f"{name}/kernel"]
        codes = codes.transpose(axes) if axes else codes.reshape(kernel.shape)
        # The file may store a multiple of the codes with a scale that is smaller by as much.
        gain = np.float32(state[f"{name}/kernel/scale"][0] / kernel.scale[0])
        assert gain == np.floor(gain + 0.5)
        np.testing.assert_array_equal(codes * gain, kernel.data)
        np.testing.assert_allclose(state[f"{name}/kernel/scale"], kernel.scale * gain, rtol=1e-6)
        bias = tensors[f"{name}/bias"]
        real = state[f"{name}/bias/codes"] * state[f"{name}/bias/scale"].astype(np.float64)
        np.testing.assert_allclose(
            real, bias.data * bias.scale.astype(np.float64), atol=state[f"{name}/bias/scale"].max()
        )
        assert np.abs(codes).max() == 2 ** (weight_bits - 1) - 1
    np.savez(tmp_path / "state.npz", **state)
    assert sorted(np.load(tmp_path / "state.npz")) == sorted(state)
