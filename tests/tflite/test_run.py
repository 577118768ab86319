import dataclasses

import numpy as np
import pytest
from tflite_models import C, X, Y, affine, conv_add, exact_conv, exact_fc, exact_sum, fc_int4, quantize, two_inputs

from kquant.core.errors import ArtifactError
from kquant.core.files import save
from kquant.tflite.flatbuffer import FileModel, FileOp, FileTensor, encode
from kquant.tflite.run import LARGEST_BATCH, Artifact, load_artifact, run_all

# Steps beyond the half of exact rounding (KERNELS.md). XNNPACK's conv multiplies by a float32, which moves a tie only.
# The built-in kernels (int4 weights too) round twice, which reaches 1/8 of a step. An ADD is within one step.
TIE, TWICE, ONE = 0.001, 0.125, 0.5


@pytest.fixture
def images():
    return np.random.default_rng(3).uniform(-7, 7, (5, 4, 4, 2)).astype(np.float32)


def raw(model, x, **more):
    return run_all(encode(model), x, **more)


@pytest.mark.parametrize("kernels, slack", [("default", TIE), ("builtin", TWICE), ("reference", TWICE)])
def test_every_value_of_a_conv_and_an_add(images, kernels, slack):
    found = raw(conv_add(dynamic=True), images, kernels=kernels)
    assert set(found) == {"x", "conv", "sum"} and {v.dtype.name for v in found.values()} == {"int8"}
    assert np.array_equal(found["x"], quantize(images, X))
    assert np.abs(found["conv"] - exact_conv(found["x"])).max() <= 0.5 + slack
    assert np.abs(found["sum"] - exact_sum(found["conv"], found["x"])).max() <= 0.5 + ONE
    assert len(np.unique(found["conv"])) > 20  # the data reach more than the clamp's ends


def test_dense_with_int4_weights():
    x = np.random.default_rng(4).uniform(-5, 5, (64, 5)).astype(np.float32)
    found = raw(fc_int4(), x)
    assert np.abs(found["y"] - exact_fc(found["x"], fc_int4())).max() <= 0.5 + TWICE
    assert len(np.unique(found["y"])) > 20


@pytest.mark.parametrize("boundary", ["int8", "float32"])
def test_an_artifact_takes_and_gives_real_values(images, boundary, tmp_path):
    save(encode(conv_add(dynamic=True, boundary=boundary)), tmp_path / "m.tflite")
    y = load_artifact(tmp_path / "m.tflite")(images)
    codes = raw(conv_add(dynamic=True), images)["sum"]
    assert y.dtype == np.float32 and y.shape == images.shape
    assert np.array_equal(y, (codes.astype(np.float32) - Y[1]) * np.float32(Y[0]))


def test_quantizing_the_input_rounds_half_up_and_saturates():
    pair = (0.5, 3)
    model = FileModel([affine(n, (1, 5), pair) for n in "xy"], [FileOp("RELU", (0,), (1,), 2)], (0,), (1,))
    x = np.array([[-0.25, 0.25, 0.75, 1e9, -np.inf]], np.float32)  # -0.5, 0.5 and 1.5 steps, and both ends
    assert raw(model, x)["x"].tolist() == [[3, 4, 5, 127, -128]]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("boundary", ["int8", "float32"])
def test_a_fixed_batch_runs_in_chunks(images, batch, boundary):
    expected = Artifact(encode(conv_add(dynamic=True, boundary=boundary)))(images)
    assert np.array_equal(Artifact(encode(conv_add(batch, boundary=boundary)))(images), expected)


def test_run_all_of_a_fixed_batch(images):
    whole = raw(conv_add(dynamic=True), images[:4])
    parts = raw(conv_add(2), images[:4])
    assert all(np.array_equal(whole[k], parts[k]) for k in whole)
    with pytest.raises(ArtifactError, match="multiple of its batch of 2"):
        raw(conv_add(2), images)


def test_a_long_dynamic_batch_is_split_and_joined():
    x = np.random.default_rng(5).uniform(-5, 5, (2 * LARGEST_BATCH + 3, 5)).astype(np.float32)
    y = Artifact(encode(fc_int4()))(x)
    codes = raw(fc_int4(), x)["y"]
    assert np.array_equal(y, (codes.astype(np.float32) - C[1]) * np.float32(C[0]))


def test_several_inputs_and_outputs():
    artifact = Artifact(encode(two_inputs(batch=2)))
    a, b = np.arange(9.0).reshape(3, 3), np.full((3, 3), 2.0)
    plus, times = artifact([a, b])
    assert np.array_equal(plus, a + b) and np.array_equal(times, a * b)
    named = artifact({"b": b, "a": a})
    assert list(named) == ["plus", "times"] and np.array_equal(named["times"], times)
    assert [p.name for p in artifact.inputs] == ["a", "b"]


def test_a_file_without_a_signature_goes_by_tensor_names(images):
    bare = dataclasses.replace(conv_add(), input_names=(), output_names=())
    expected = Artifact(encode(conv_add()))({"image": images})
    assert np.array_equal(Artifact(encode(bare))({"x": images}), expected)
    assert set(run_all(encode(bare), {"x": images})) == {"x", "conv", "sum"}


def gather(dtype="int32"):
    tensors = [
        FileTensor("ids", (1, 2), dtype, signature=(-1, 2)),
        FileTensor("table", (3,), "int8", np.array([5, 6, 7], np.int8)),
        FileTensor("y", (1, 2), "int8", signature=(-1, 2)),
    ]
    options = ("GatherOptions", {"axis": 0, "batchDims": 0})
    return FileModel(tensors, [FileOp("GATHER", (1, 0), (2,), 2, options)], (0,), (2,), ("ids",), ("y",))


def test_whole_numbers_for_an_integer_input():
    artifact = Artifact(encode(gather()))
    assert artifact(np.array([[0.0, 2.0], [1.0, 1.0]])).tolist() == [[5, 7], [6, 6]]
    for wrong in ([[0.5, 1]], [[2**31, 1]], [[np.inf, 1]], [[np.nan, 1]]):
        with pytest.raises(ArtifactError, match=r"input 'ids'"):
            artifact(np.array(wrong, np.float64))


def test_a_list_is_an_array_or_the_one_input():
    artifact, x = Artifact(encode(fc_int4())), np.ones((1, 5), np.float32)
    assert artifact([[1, 1, 1, 1, 1]]).tolist() == artifact([x]).tolist() == artifact([x[0]]).tolist()


WRONG = {
    "rank": (np.zeros((4, 4, 2)), r"\(batch, 4, 4, 2\) is expected.*Received: \(4, 4, 2\)"),
    "shape": (np.zeros((1, 4, 5, 2)), r"Received: \(1, 4, 5, 2\)"),
    "empty": (np.zeros((0, 4, 4, 2)), "at least one sample"),
    "nan": (np.full((1, 4, 4, 2), np.nan), "NaN"),
    "name": ({"imge": np.zeros((1, 4, 4, 2))}, "'image'.*Received: 'imge'"),
    "missing": ({}, "none for .'image'"),
    "number": ([np.zeros((1, 4, 4, 2))] * 2, r"\(batch, 4, 4, 2\) is expected"),
    "text": (np.full((1, 4, 4, 2), "a"), "numbers"),
    "ragged": ([[1, 2], [3]], "an array"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_named(name):
    x, message = WRONG[name]
    with pytest.raises(ArtifactError, match=message) as error:
        Artifact(encode(conv_add(dynamic=True)), "m.tflite")(x)
    assert "m.tflite" in str(error.value)


def test_wrong_numbers_of_inputs_and_samples():
    artifact = Artifact(encode(two_inputs()))
    with pytest.raises(ArtifactError, match=r"2 inputs are expected.*Received: 1 inputs"):
        artifact(np.zeros((2, 3)))
    with pytest.raises(ArtifactError, match="same number of samples"):
        artifact([np.zeros((2, 3)), np.zeros((4, 3))])


def test_kernels_must_be_known():
    with pytest.raises(ArtifactError, match="'reference'"):
        Artifact(encode(conv_add()), kernels="refrence")


def test_an_op_that_the_runtime_lacks_is_an_error_of_the_file(tmp_path):
    tensors = [FileTensor(n, (1, 2), "float32") for n in "xy"]
    model = FileModel(tensors, [FileOp("CUSTOM:Mine", (0,), (1,))], (0,), (1,), ("x",), ("y",))
    save(encode(model), tmp_path / "custom.tflite")
    with pytest.raises(ArtifactError, match=r"custom\.tflite"):
        load_artifact(tmp_path / "custom.tflite")(np.zeros((1, 2)))


def test_a_file_that_is_missing_or_damaged(tmp_path):
    (tmp_path / "short.tflite").write_bytes(encode(conv_add())[:200])
    for name in ("short.tflite", "missing.tflite", "."):
        with pytest.raises(ArtifactError) as error:
            load_artifact(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_run_all_keeps_tensors_of_equal_names_apart(images):
    model = conv_add()
    model.tensors[4] = dataclasses.replace(model.tensors[4], name="conv")
    found = run_all(encode(model), images)
    assert set(found) == {"x", "conv", "conv#3"} or set(found) == {"x", "conv", "conv#4"}
    assert len({v.tobytes() for v in found.values()}) == 3
