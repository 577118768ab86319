"""The ONNX file: every layer and function held against the model, and against the TorchScript file, in onnxruntime."""

import collections

import numpy as np
import pytest
import torch
from qdq_cases_torch import calibrated, cases
from small_torch import exported, images

import kquant_torch
from kquant.core.errors import ArtifactError, ExportError, UnsupportedError
from kquant_torch.export import integer_model, quantized_graph
from kquant_torch.onnx_emit import ONNX, WRITERS
from kquant_torch.onnx_export import OnnxFile
from kquant_torch.run import run_all

onnx = pytest.importorskip("onnx", reason="onnx is an extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")

# Each op kind and each form of its settings once; all of them take minutes.
CHOSEN = (
    "conv1d", "conv2d same", "conv3d", "depthwise conv", "transposed conv2d", "linear on tokens",
    "embedding bag", "prelu", "batch norm alone", "linear + norm", "layer norm", "attention", "max pools",
    "average pool", "adaptive pools", "upsample nearest", "upsample bilinear", "paddings", "pixel shuffle",
    "activation relu6", "activation sigmoid", "activation softmax", "x - y", "x * y", "scalars", "maximum",
    "grouped transposed conv", "transposed conv + norm", "adaptive average of unlike windows", "log_softmax",
    "tied embedding", "cat with constants", "position", "causal attention",
    "attention with the batch second", "where with numbers",
    "cat", "slices", "gather", "sum", "amax", "matmul", "class token", "expand",
)  # fmt: skip


@pytest.mark.parametrize(("name", "config"), cases(CHOSEN))
def test_a_file_holds_and_computes_what_was_trained(name, config, tmp_path):
    qmodel, batches = calibrated(name, config)
    path = tmp_path / "model.onnx"
    kquant_torch.export_onnx(qmodel, path, example_inputs=batches[0])
    parity = kquant_torch.verify(qmodel, path, batches)
    assert parity.ok, parity.problems


def test_what_has_no_form_is_refused_by_name_and_leaves_nothing(tmp_path, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    model = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 3)).eval()
    qmodel = kquant_torch.wrap(model, example_inputs=x, calibration_data=[x]).eval()
    monkeypatch.delitem(WRITERS, "conv2d_transpose")
    with pytest.raises(UnsupportedError, match=r"op '0'.*conv2d_transpose"):
        kquant_torch.export_onnx(qmodel, tmp_path / "model.onnx", example_inputs=x)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A network as TorchScript and as ONNX."""
    folder = tmp_path_factory.mktemp("onnx")
    qmodel, script = exported(folder)
    kquant_torch.export_onnx(qmodel, folder / "model.onnx", example_inputs=images())
    return qmodel, script, folder / "model.onnx"


def test_it_agrees_with_torchscript_op_by_op_within_one_code(both):
    """Wherever both read the same codes, both write codes at most one apart."""
    qmodel, script, path = both
    model = integer_model(quantized_graph(qmodel), ONNX)
    x = images(16).numpy()
    theirs = OnnxFile(path.read_bytes(), "file", model).run([x])
    ours = run_all(script.read_bytes(), [x])
    compared = 0
    for op in model.ops:
        known = [t for t in (*op.inputs, *op.outputs) if t in ours and t in theirs]
        if len(known) < 2 or any(not np.array_equal(ours[t], theirs[t]) for t in known[:-1]):
            continue
        distance = np.abs(ours[known[-1]].astype(np.float64) - theirs[known[-1]])
        assert distance.max() <= 1, op.id
        compared += 1
    assert compared >= 3  # a tie that falls the other way ends the comparison downstream


def test_onnxruntime_fuses_it_into_integer_kernels(both, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(both[2]), options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(n.op_type for n in onnx.load(tmp_path / "fused.onnx").graph.node)
    assert kinds["QLinearConv"] == 2 and kinds["QGemm"] == 1 and kinds["QLinearAdd"] == 1
    assert kinds["Conv"] == kinds["Gemm"] == 0


def test_any_batch_and_one_changed_number(both, tmp_path):
    qmodel, _, path = both
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": images(7).numpy()})[0].shape == (7, 5)
    file = onnx.load(path)
    for index, name in ((0, "depth/kernel"), (1, "depth/bias"), (0, "depth/scale"), (0, "depth/zero_point")):
        changed = onnx.ModelProto()
        changed.CopyFrom(file)
        (initializer,) = [i for i in changed.graph.initializer if i.name == name]
        values = onnx.numpy_helper.to_array(initializer).copy().reshape(-1)
        values[index] = values[index] * np.float32(1.00001) if values.dtype == np.float32 else values[index] - 1
        shape = onnx.numpy_helper.to_array(initializer).shape
        initializer.CopyFrom(onnx.numpy_helper.from_array(values.reshape(shape), name))
        (tmp_path / "changed.onnx").write_bytes(changed.SerializeToString())
        report = kquant_torch.verify(qmodel, tmp_path / "changed.onnx", images(8).numpy())
        assert not report.ok and "depth" in report.problems[0], name


@pytest.mark.parametrize("content", [b"", b"no file", b"\x08\x09\x12\x06kquant"])
def test_files_that_are_none(both, tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError):
        kquant_torch.verify(both[0], tmp_path / "model.onnx", images().numpy())


def test_bad_arguments(both, tmp_path):
    with pytest.raises(ExportError, match="input_type"):
        kquant_torch.export_onnx(both[0], tmp_path / "m.onnx", example_inputs=images(), input_type="int8")
