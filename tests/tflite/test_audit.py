import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tflite_models import ADD, CONV, FC, C, X, affine, constant, conv_add, fc_int4, two_inputs

from kquant.core.errors import ArtifactError
from kquant.core.reports import AuditReport
from kquant.tflite.audit import audit, audit_bytes
from kquant.tflite.flatbuffer import FileModel, FileOp, FileTensor, encode, schema
from kquant.tflite.versions import RUNTIMES, least_runtime

CONV_BYTES = encode(conv_add(boundary="float32"))
CONV_MACS = 4 * 4 * 2 * (3 * 3 * 2)  # outputs times kernel


def audited(*args, **kwargs):
    return audit_bytes(encode(FileModel(*args, **kwargs)))


def test_a_fully_integer_file(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(CONV_BYTES)
    report = audit(path)
    assert report.fully_integer and report.float_ops == [] and report.integer_mac_fraction == 1.0
    assert (report.macs, report.file_bytes, report.path) == (CONV_MACS, len(CONV_BYTES), str(path))
    assert report.op_counts == {"QUANTIZE": 1, "CONV_2D": 1, "ADD": 1, "DEQUANTIZE": 1}
    conv = report.ops[1]
    assert conv == ("conv", "CONV_2D", ("int8", "int8", "int32"), "int8", "per-channel", 8, 36 + 8, CONV_MACS)
    assert report.ops[2][4:] == ("-", None, 0, 0)
    assert report.least_runtime == "1.14.0"  # CONV_2D 3, ADD 2 and DEQUANTIZE 2 of runtime_version.cc


def test_int4_weights_and_their_bytes():
    report = audit_bytes(encode(fc_int4()))
    assert report.fully_integer and report.least_runtime == "2.11.0"
    assert report.ops[0][4:] == ("per-tensor", 4, 8 + 12, 15)  # 15 codes in 8 bytes, three int32; 5x3 MACs


@pytest.mark.parametrize("batch", [1, 4])
def test_macs_are_counted_at_batch_one(batch):
    assert audit_bytes(encode(conv_add(batch))).macs == CONV_MACS


def shaped(kind, shapes, options=None):
    """A float op over constants and values of these shapes: (inputs ..., output)."""
    tensors = [FileTensor(f"t{i}", s, "float32") for i, s in enumerate(shapes)]
    last = len(shapes) - 1
    return audited(tensors, [FileOp(kind, tuple(range(last)), (last,), 1, options)], (), (last,))


SHAPES = {
    "DEPTHWISE_CONV_2D": ([(1, 8, 8, 3), (1, 5, 3, 6), (1, 4, 4, 6)], 4 * 4 * 6 * 15),
    "TRANSPOSE_CONV": ([(4,), (7, 3, 2, 5), (1, 4, 4, 5), (1, 8, 8, 7)], 4 * 4 * 5 * 3 * 2 * 7),
    "FULLY_CONNECTED": ([(1, 6, 10), (4, 10), (1, 6, 4)], 6 * 10 * 4),
    "BATCH_MATMUL": ([(1, 2, 3, 5), (1, 2, 5, 7), (1, 2, 3, 7)], 2 * 3 * 5 * 7),
    "CONV_3D": ([(1, 4, 4, 4, 2), (3, 3, 3, 2, 5), (1, 2, 2, 2, 5)], 8 * 5 * 27 * 2),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_macs_by_definition(kind):
    shapes, macs = SHAPES[kind]
    report = shaped(kind, shapes)
    assert report.macs == macs and report.integer_mac_fraction == 0 and not report.fully_integer


def test_macs_of_a_transposed_left_operand():
    options = ("BatchMatMulOptions", {"adjX": True})
    assert shaped("BATCH_MATMUL", [(1, 5, 3), (1, 5, 7), (1, 3, 7)], options).macs == 5 * 3 * 7


@pytest.mark.parametrize("shapes, message", [([(9,)] * 3, "right rank"), ([(9,)] * 2, "needs activations")])
def test_a_mac_op_without_its_operands_is_a_damaged_file(shapes, message):
    with pytest.raises(ArtifactError, match=message):
        shaped("DEPTHWISE_CONV_2D", shapes)


W8 = constant("w", np.ones((3, 5), np.int8), scale=0.1)
FLOAT = {n: FileTensor(n, (1, 5), "float32") for n in ("x", "y", "z")}
OUT = FileTensor("out", (1, 3), "float32")
CASES = {  # tensors, ops, inputs, outputs, (name, cause) of every row
    "float": (
        [FLOAT["x"], FLOAT["y"]], [FileOp("RELU", (0,), (1,))], (0,), (1,),
        [("y", "activation input float32")],
    ),
    "hybrid": (
        [FLOAT["x"], W8, OUT], [FileOp("FULLY_CONNECTED", (0, 1, -1), (2,), 3, FC)], (0,), (2,),
        [("out", "hybrid: int8 weights with float32 activations")],
    ),
    "weight-only": (
        [FLOAT["x"], W8, FileTensor("wf", (3, 5), "float32"), OUT],
        [FileOp("DEQUANTIZE", (1,), (2,)), FileOp("FULLY_CONNECTED", (0, 2, -1), (3,), 1, FC)], (0,), (3,),
        [("wf", "weight-only: int8 constant dequantized to float32"),
         ("out", "weight-only: int8 weights dequantized, float32 activations")],
    ),
    "custom": (
        [affine("x", (1, 5), X), affine("y", (1, 5), X)], [FileOp("CUSTOM:Mine", (0,), (1,))], (0,), (1,),
        [("y", "custom op")],
    ),
    "flex": (
        [affine("x", (1, 5), X), affine("y", (1, 5), X)], [FileOp("CUSTOM:FlexErf", (0,), (1,))], (0,), (1,),
        [("y", "flex op")],
    ),
    "island": (
        [affine("x", (1, 5), X), FLOAT["y"], FLOAT["z"], affine("q", (1, 5), C)],
        [FileOp("DEQUANTIZE", (0,), (1,)), FileOp("COS", (1,), (2,)), FileOp("QUANTIZE", (2,), (3,))], (0,), (3,),
        [("y", "dequantizes to float32 inside the model"), ("z", "activation input float32"),
         ("q", "quantizes a float32 value computed inside the model")],
    ),
    "input shared with a float op": (
        [FLOAT["x"], affine("q", (1, 5), X), FLOAT["y"]],
        [FileOp("QUANTIZE", (0,), (1,)), FileOp("RELU", (0,), (2,))], (0,), (1, 2),
        [("y", "activation input float32")],
    ),
    "output read again": (
        [affine("q", (1, 5), X), FLOAT["x"], FLOAT["y"]],
        [FileOp("DEQUANTIZE", (0,), (1,)), FileOp("RELU", (1,), (2,))], (0,), (1, 2),
        [("y", "activation input float32")],
    ),
    "float constant": (
        [affine("q", (1, 5), X), constant("k", np.ones(5, np.float32)), affine("y", (1, 5), X)],
        [FileOp("ADD", (0, 1), (2,), 1, ADD)], (0,), (2,),
        [("y", "constant float32")],
    ),
    "float output": (
        [FileTensor("i", (1, 5), "int32"), FLOAT["y"]], [FileOp("CAST", (0,), (1,))], (0,), (1,),
        [("y", "output float32")],
    ),
    "input is output": (
        [FLOAT["x"]], [], (0,), (0,),
        [("x", "float32 tensor that no QUANTIZE or DEQUANTIZE bounds")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_integer_has_its_cause(name):
    tensors, ops, inputs, outputs, rows = CASES[name]
    report = audited(tensors, ops, inputs, outputs)
    assert [(r.name, r.cause) for r in report.float_ops] == rows
    assert not report.fully_integer
    assert report.integer_mac_fraction == 0


def test_the_share_of_integer_macs():
    x, sw = X[0], np.float32([0.1])
    tensors = [
        affine("x", (1, 5), X), W8, constant("b", np.zeros(3, np.int32), scale=sw * x), affine("y", (1, 3), C),
        FileTensor("f", (1, 3), "float32"), constant("v", np.ones((4, 3), np.float32)),
        FileTensor("z", (1, 4), "float32"),
    ]  # fmt: skip
    ops = [
        FileOp("FULLY_CONNECTED", (0, 1, 2), (3,), 4, FC),
        FileOp("DEQUANTIZE", (3,), (4,)),
        FileOp("FULLY_CONNECTED", (4, 5, -1), (6,), 1, FC),
    ]
    report = audited(tensors, ops, (0,), (6,))
    assert report.macs == 15 + 12 and report.integer_mac_fraction == 15 / 27


def test_all_subgraphs_count():
    import flatbuffers

    parts = [schema().ModelT.InitFromPackedBuf(encode(m)) for m in (conv_add(), two_inputs())]
    file = parts[0]
    first = len(file.operatorCodes)
    file.operatorCodes += parts[1].operatorCodes
    for op in parts[1].subgraphs[0].operators:
        op.opcodeIndex += first
    for tensor in parts[1].subgraphs[0].tensors:
        tensor.buffer = 0
    file.subgraphs += parts[1].subgraphs
    builder = flatbuffers.Builder(1024)
    builder.Finish(file.Pack(builder), b"TFL3")
    report = audit_bytes(bytes(builder.Output()))
    assert [r.name for r in report.float_ops] == ["tsum", "tproduct"]
    assert report.op_counts == {"CONV_2D": 1, "ADD": 2, "MUL": 1}


@pytest.mark.parametrize(
    "channels, scales, granularity", [(3, 3, "per-channel"), (3, 1, "per-tensor"), (1, 1, "per-channel")]
)
def test_granularity(channels, scales, granularity):
    w = constant("w", np.ones((channels, 1, 1, 2), np.int8), scale=np.full(scales, 0.1))
    tensors = [affine("x", (1, 2, 2, 2), X), w, affine("y", (1, 2, 2, channels), C)]
    assert (
        audited(tensors, [FileOp("CONV_2D", (0, 1, -1), (2,), 3, CONV)], (0,), (2,)).ops[0].granularity == granularity
    )


def test_least_runtime_compares_numbers_and_names_what_it_does_not_know():
    assert least_runtime([("RESHAPE", 1), ("CONV_2D", 2)]) == "1.14.0"  # not "1.5.0", which is later as text
    assert least_runtime([("CONV_2D", 99), ("BITCAST", 1)]) == "2.13.0 (unknown: CONV_2D v99)"
    assert least_runtime([("BROADCAST_TO", 1)]) == "1.5.0 (unknown: BROADCAST_TO v1)"


def test_the_table_of_versions_names_ops_of_the_schema():
    assert set(RUNTIMES) <= set(vars(schema().BuiltinOperator))


def test_the_report_prints_and_is_plain_data():
    report = audit_bytes(encode(two_inputs()), "two.tflite")
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["float_ops"][0] == {"name": "tsum", "kind": "ADD", "cause": "activation input float32"}
    assert data["ops"][1]["inputs"] == ["float32", "float32"] and data["fully_integer"] is False
    assert set(data) == {f.name for f in dataclasses.fields(AuditReport)}
    text = str(report).splitlines()
    assert "  fully integer  no" in text
    assert "tproduct  MUL   activation input float32" in text


def test_a_path_that_is_no_artifact(tmp_path):
    (tmp_path / "short").write_bytes(CONV_BYTES[:300])
    (tmp_path / "random").write_bytes(np.random.default_rng(1).bytes(4000))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("short", "random", "empty", "missing", "."):
        with pytest.raises(ArtifactError) as error:
            audit(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


@given(
    st.lists(st.tuples(st.integers(0, len(CONV_BYTES) - 1), st.integers(0, 255)), max_size=30),
    st.integers(0, len(CONV_BYTES)),
)
def test_damaged_bytes_never_raise_anything_else(changes, end):
    data = bytearray(CONV_BYTES)
    for index, value in changes:
        data[index] = value
    for damaged in (bytes(data), bytes(data[:end])):
        try:
            audit_bytes(damaged)
        except ArtifactError:
            pass
