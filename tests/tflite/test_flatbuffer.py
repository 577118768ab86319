import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tflite_models import ADD, conv_add, fc_int4, two_inputs

from kquant.core.errors import ArtifactError, ExportError
from kquant.tflite.flatbuffer import (
    FileModel,
    FileOp,
    FileTensor,
    decode,
    decode_all,
    encode,
    pack_int4,
    schema,
    unpack_int4,
)

MODELS = {
    "conv": conv_add(dynamic=True, metadata={"min_runtime_version": b"1.14.0\0"}),
    "boundary": conv_add(boundary="float32"),
    "int4": fc_int4(),
    "two": two_inputs(),
    "optional": dataclasses.replace(fc_int4(), ops=[dataclasses.replace(fc_int4().ops[0], inputs=(0, 1, -1))]),
    "custom": FileModel(
        [FileTensor("x", (1,), "float32"), FileTensor("y", (1,), "float32", is_variable=True)],
        [FileOp("CUSTOM:FlexErf", (0,), (1,), custom_options=b"\1\2")],
        (0,),
        (1,),
    ),
}
CONV_BYTES = encode(MODELS["conv"])


def unpacked(data):
    return schema().ModelT.InitFromPackedBuf(data)


def packed(file):
    """The bytes of a file that was changed through the schema's own classes."""
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(file.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@pytest.mark.parametrize("name", MODELS)
def test_decode_gives_what_was_encoded(name):
    data = encode(MODELS[name])
    again = decode(data)
    for ours, theirs in zip(MODELS[name].tensors, again.tensors, strict=True):
        assert ours == theirs, ours.name
    for ours, theirs in zip(MODELS[name].ops, again.ops, strict=True):
        filled = {} if ours.options is None else {**theirs.options[1], **ours.options[1]}
        assert theirs.options == (None if ours.options is None else (ours.options[0], filled))  # fields by default
        assert dataclasses.replace(theirs, options=None) == dataclasses.replace(ours, options=None)
    assert dataclasses.replace(again, ops=[]) == dataclasses.replace(MODELS[name], ops=[])
    assert encode(again) == data  # same model, same bytes


def test_tensors_differ_by_each_field():
    tensor = MODELS["conv"].tensors[1]
    changes = {
        "name": "v", "shape": (1,), "dtype": "uint8", "data": tensor.data + np.int8(1), "scale": tensor.scale * 2,
        "zero_point": tensor.zero_point + 1, "axis": 1, "signature": (-1,), "is_variable": True,
    }  # fmt: skip
    assert set(changes) == {f.name for f in dataclasses.fields(tensor)}
    for name, value in changes.items():
        assert dataclasses.replace(tensor, **{name: value}) != tensor, name


def test_header_version_and_alignment():
    assert CONV_BYTES[4:8] == b"TFL3"
    file = unpacked(CONV_BYTES)
    assert file.version == 3 and file.buffers[0].data is None
    base = np.frombuffer(CONV_BYTES, np.uint8).ctypes.data
    offsets = [b.data.ctypes.data - base for b in file.buffers[1:]]
    assert len(offsets) == 3 and not any(o % 16 for o in offsets), offsets


def test_equal_constants_share_a_buffer():
    twice = [FileTensor(n, (2,), "int32", np.array([1, 2], np.int32)) for n in "ab"]
    data = encode(FileModel(twice, [], (), ()))
    assert len(unpacked(data).buffers) == 2
    assert decode(data).tensors == twice


def test_int4_low_nibble_first():
    data = encode(fc_int4())
    raw = unpacked(data).buffers[1].data.tolist()
    assert len(raw) == 8  # 15 codes
    assert raw[0] == 0x79 and raw[1] == 0x01 and raw[7] == 0x07  # (-7, 7), (1, 0), (7, nothing)


@given(st.lists(st.integers(-8, 7), max_size=9))
def test_int4_packing_is_inverted(codes):
    codes = np.array(codes, np.int8)
    assert unpack_int4(pack_int4(codes), codes.size).tolist() == codes.tolist()


@pytest.mark.parametrize("opcode, code, old", [("ADD", 0, 0), ("CUSTOM:Mine", 32, 32), ("BITCAST", 159, 127)])
def test_opcodes_in_both_fields(opcode, code, old):
    tensors = [FileTensor(n, (1,), "int32") for n in "xy"]
    data = encode(FileModel(tensors, [FileOp(opcode, (0,), (1,))], (0,), (1,)))
    (found,) = unpacked(data).operatorCodes
    assert (found.builtinCode, found.deprecatedBuiltinCode) == (code, old)
    assert decode(data).ops[0].opcode == opcode


def test_an_old_file_without_the_wide_opcode_field():
    file = unpacked(encode(two_inputs()))
    for code in file.operatorCodes:
        code.builtinCode = 0
    assert [op.opcode for op in decode(packed(file)).ops] == ["ADD", "MUL"]


def test_names_follow_the_tensors_not_the_signatures_order():
    file = unpacked(encode(two_inputs()))
    file.signatureDefs[0].inputs.reverse()
    assert decode(packed(file)).input_names == ("a", "b")


def several_subgraphs():
    file = unpacked(encode(two_inputs()))
    file.subgraphs += unpacked(encode(two_inputs(batch=5))).subgraphs
    return packed(file)


def test_several_subgraphs():
    data = several_subgraphs()
    first, second = decode_all(data)
    assert (first.tensors[0].shape, second.tensors[0].shape) == ((2, 3), (5, 3))
    assert decode(data) == first and first.other_subgraphs == 1
    assert first.input_names == ("a", "b") and second.input_names == ()
    with pytest.raises(ExportError, match="2 subgraphs"):
        encode(first)


X = FileTensor("x", (2,), "float32")
BAD = {
    "dtype": ([FileTensor("x", (2,), "int5")], [], "int5"),
    "constant shape": ([FileTensor("x", (2,), "int8", np.zeros(3, np.int8))], [], r"int8 of shape \(2,\)"),
    "constant dtype": ([FileTensor("x", (2,), "int8", np.zeros(2, np.int16))], [], "int16"),
    "int4 range": ([FileTensor("x", (2,), "int4", np.array([8, 0], np.int8))], [], "-8..7"),
    "opcode": ([X], [FileOp("CONV2D", (0,), (0,))], "CONV_2D"),
    "input index": ([X], [FileOp("RELU", (1,), (0,))], "op RELU"),
    "absent output": ([X], [FileOp("RELU", (0,), (-1,))], "Received: -1"),
    "option class": ([X], [FileOp("ADD", (0, 0), (0,), 1, ("AddOption", {}))], "AddOptions"),
    "option field": ([X], [FileOp("ADD", (0, 0), (0,), 1, ("AddOptions", {"activation": 1}))], "fusedActivation"),
    "option value": ([X], [FileOp("ADD", (0, 0), (0,), 1, ("AddOptions", {"fusedActivationFunction": "r"}))], "schema"),
}


@pytest.mark.parametrize("name", BAD)
def test_encode_refuses(name):
    tensors, ops, message = BAD[name]
    with pytest.raises(ExportError, match=message):
        encode(FileModel(tensors, ops, (), ()))


def test_encode_refuses_a_signature_that_does_not_fit():
    with pytest.raises(ExportError, match="2 different names"):
        encode(dataclasses.replace(two_inputs(), input_names=("a", "a")))


@pytest.mark.parametrize(
    "data", [b"", b"TFL3", b"\0" * 4 + b"TFL2" + b"\0" * 99, np.random.default_rng(0).bytes(5000), b"PK\3\4" * 9]
)
def test_decode_refuses_what_is_no_model(data):
    with pytest.raises(ArtifactError, match="here: "):
        decode(data, "here")


def test_decode_checks_the_identifier():
    with pytest.raises(ArtifactError, match="identifier TFL3"):
        decode(CONV_BYTES[:4] + b"TFL2" + CONV_BYTES[8:])


@pytest.mark.parametrize("index", [-2, 4])
def test_decode_refuses_an_index_out_of_range(index):
    file = unpacked(encode(two_inputs()))
    file.subgraphs[0].operators[0].inputs = [index, 0]
    with pytest.raises(ArtifactError, match=rf"an input of ADD must lie in -1\.\.3.*Received: {index}"):
        decode(packed(file))


def test_decode_does_not_follow_one_vector_again_and_again():
    """A file of 16 KB whose 2000 tensors are one tensor, whose shape has 2000 sizes: 4 million visits."""
    import flatbuffers

    s, b = schema(), flatbuffers.Builder(1024)
    shape = b.CreateNumpyVector(np.ones(2000, np.int32))
    s.TensorStart(b)
    s.TensorAddShape(b, shape)
    tensor = s.TensorEnd(b)
    s.SubGraphStartTensorsVector(b, 2000)
    for _ in range(2000):
        b.PrependUOffsetTRelative(tensor)
    tensors = b.EndVector()
    s.SubGraphStart(b)
    s.SubGraphAddTensors(b, tensors)
    graphs = [s.SubGraphEnd(b)]
    s.ModelStartSubgraphsVector(b, 1)
    b.PrependUOffsetTRelative(graphs[0])
    vector = b.EndVector()
    s.BufferStart(b)
    empty = s.BufferEnd(b)
    s.ModelStartBuffersVector(b, 1)
    b.PrependUOffsetTRelative(empty)
    buffers = b.EndVector()
    s.ModelStart(b)
    s.ModelAddSubgraphs(b, vector)
    s.ModelAddBuffers(b, buffers)
    b.Finish(s.ModelEnd(b), b"TFL3")
    with pytest.raises(ArtifactError, match="longer than the file"):
        decode(bytes(b.Output()))


@pytest.mark.parametrize("end", range(0, len(CONV_BYTES) - 40, 67))
def test_decode_refuses_truncated_bytes(end):
    with pytest.raises(ArtifactError):
        decode(CONV_BYTES[:end])


def test_decode_refuses_a_constant_of_the_wrong_size():
    file = unpacked(encode(MODELS["int4"]))
    file.subgraphs[0].tensors[1].shape = [3, 7]
    with pytest.raises(ArtifactError, match=r"'w'.*8 bytes for int4 \[3, 7\]"):
        decode(packed(file))


@given(st.lists(st.tuples(st.integers(0, len(CONV_BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=40))
def test_damaged_bytes_never_raise_anything_else(changes):
    data = bytearray(CONV_BYTES)
    for index, value in changes:
        data[index] = value
    try:
        decode_all(bytes(data))
    except ArtifactError:
        pass


def test_importing_flatbuffer_imports_no_framework():
    import subprocess
    import sys

    code = (
        "import sys, kquant.tflite.audit, kquant.tflite.run as r; print(sorted({m.split('.')[0] for m in sys.modules}))"
    )
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"'tensorflow'", "'ai_edge_litert'", "'flatbuffers'", "'keras'"} & set(names.strip("[]\n").split(", "))


def test_a_large_constant_takes_no_python_loop():
    """32 MB in well under a second; a loop over bytes takes half a minute."""
    import time

    big = FileTensor(
        "w", (32, 1024, 1024), "int8", np.arange(1 << 25, dtype=np.int32).astype(np.int8).reshape(32, 1024, 1024)
    )
    start = time.perf_counter()
    model = FileModel([big], [FileOp("ADD", (0, 0), (0,), 2, ADD)], (), ())
    assert decode(encode(model)).tensors[0] == big
    assert time.perf_counter() - start < 5
