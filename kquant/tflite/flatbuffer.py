"""A `.tflite` file as plain data: `decode` reads one, `encode` writes one.

Source: the schema, tensorflow/lite/schema/schema.fbs. Its generated Python classes come with LiteRT and TensorFlow and
are imported when first used, so that importing kquant imports no framework.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from kquant.core.errors import ArtifactError, ExportError, KQuantError, nearest

FILE_IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
ALIGNMENT = 16  # bytes; the runtime maps constants in place, and XNNPACK wants them aligned
SIGNATURE_KEY = "serving_default"
# Opcodes above this one do not fit the int8 field of old files, which then holds this placeholder (schema.fbs).
LARGEST_OLD_OPCODE = 127
# Bits of an element whose constants we hold as flat bytes, because numpy has no such type; None: of variable size.
RAW_BITS: dict[str, int | None] = {
    "uint4": 4, "int2": 2, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8,
    "string": None, "resource": None, "variant": None,
}  # fmt: skip
READER_ERRORS = (struct.error, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError)
REWRITE = "The file is truncated or damaged: write or download it again"


@dataclass(frozen=True, eq=False)
class FileTensor:
    """One tensor of the file.

    Args:
        name: as in the file.
        shape: with 1 where the batch is dynamic.
        dtype: float32, float16, int4, int8, uint8, int16, int32, int64, bool; also what else the schema knows, in
            lower case.
        data: the constant, an array of `shape` and `dtype`; None for what is computed. An int4 constant is an int8
            array of codes (two codes a byte in the file, low nibble first). Types that numpy lacks are flat bytes.
        scale, zero_point: float32 and int64 arrays of one element, or one per slice along `axis`; None: not quantized.
        signature: the shape with -1 for dynamic dimensions; None where all are fixed.
        is_variable: a state that the interpreter keeps between runs (LSTM).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: np.ndarray | None = None
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    axis: int = 0
    signature: tuple[int, ...] | None = None
    is_variable: bool = False

    def _key(self) -> tuple[Any, ...]:
        arrays = (None if a is None else np.asarray(a) for a in (self.data, self.scale, self.zero_point))
        as_bytes = tuple(None if a is None else (a.shape, a.dtype.str, a.tobytes()) for a in arrays)
        return (self.name, self.shape, self.dtype, self.axis, self.signature, self.is_variable, as_bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileTensor) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((self.name, self.shape, self.dtype))


@dataclass(frozen=True)
class FileOp:
    """One op of the file.

    Args:
        opcode: name in the schema's BuiltinOperator (`CONV_2D`), or `CUSTOM:<name>` (a flex op is `CUSTOM:Flex<op>`).
        inputs, outputs: tensor indices; an input of -1 is an optional tensor that is absent.
        version: the op's version, which says what the kernel must be able to do.
        options: class name and fields, as in the schema's object API: `("Conv2DOptions", {"strideW": 1})`.
        custom_options: the bytes of a custom op's options.
        intermediates: tensor indices whose scales an integer LSTM reads.
    """

    opcode: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    version: int = 1
    options: tuple[str, dict[str, Any]] | None = None
    custom_options: bytes = b""
    intermediates: tuple[int, ...] = ()


@dataclass(frozen=True)
class FileModel:
    """One subgraph of the file with its signature and the file's metadata.

    `input_names` and `output_names` are the signature's names in the order of `inputs` and `outputs`; empty for a file
    without a signature. `other_subgraphs` counts the rest of the file, which `decode_all` gives.
    """

    tensors: list[FileTensor]
    ops: list[FileOp]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    metadata: dict[str, bytes] = field(default_factory=dict)
    description: str = ""
    other_subgraphs: int = 0


@functools.cache
def schema() -> ModuleType:
    """The generated schema classes: LiteRT's, which import in a moment, else TensorFlow's copy of the same."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError:
        from tensorflow.lite.python import schema_py_generated
    return schema_py_generated


@functools.cache
def _enum(name: str) -> dict[str, int]:
    return {k: v for k, v in vars(getattr(schema(), name)).items() if not k.startswith("_")}


@functools.cache
def enum_names(name: str) -> dict[int, str]:
    """Names of a schema enum by number."""
    return {v: k for k, v in _enum(name).items()}


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, low nibble first, zero-padded to a whole byte. `codes`: int8 in -8..7, any shape; uint8 result.

    Example:
        >>> pack_int4(np.array([1, -2, 7], np.int8)).tolist()
        [225, 7]
    """
    nibbles = np.zeros(codes.size + codes.size % 2, np.uint8)
    nibbles[: codes.size] = codes.reshape(-1).view(np.uint8) & 15
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_int4(raw: np.ndarray, count: int) -> np.ndarray:
    """The first `count` codes (int8, flat) of packed bytes; the inverse of `pack_int4`."""
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)[:count].view(np.int8)
    return (nibbles ^ 8) - np.int8(8)


# ---------------------------------------------------------------------------------------------------------- writing


def encode(model: FileModel) -> bytes:
    """The bytes of the file. Same model, same bytes; equal constants share one buffer.

    Raises:
        ExportError: an unknown opcode, dtype or option; an index out of range; a constant that does not fit its tensor;
            a model of which only one of several subgraphs is here; more than the 2 GB a flatbuffer holds.
    """
    import flatbuffers

    if model.other_subgraphs:
        raise ExportError(
            "tflite file",
            "a model of one subgraph can be written",
            f"{model.other_subgraphs + 1} subgraphs",
            "Write its primary subgraph alone",
        )
    s = schema()
    file = s.ModelT(version=SCHEMA_VERSION, description=model.description)
    buffers = _Buffers(s)
    codes = list(dict.fromkeys((op.opcode, op.version) for op in model.ops))
    count = len(model.tensors)
    graph = s.SubGraphT(name="main")
    graph.tensors = [_tensor_out(t, buffers) for t in model.tensors]
    graph.operators = [_op_out(op, codes.index((op.opcode, op.version)), count) for op in model.ops]
    graph.inputs = _indices(model.inputs, count, "model inputs")
    graph.outputs = _indices(model.outputs, count, "model outputs")
    file.operatorCodes = [_opcode_out(*code) for code in codes]
    file.subgraphs = [graph]
    file.metadata = [
        s.MetadataT(name=k, buffer=buffers.add(np.frombuffer(v, np.uint8))) for k, v in model.metadata.items()
    ]
    file.signatureDefs = _signature_out(model)
    file.buffers = buffers.list
    try:
        builder = flatbuffers.Builder(buffers.size + 4096 + 512 * (count + len(model.ops)))
        builder.Finish(file.Pack(builder), FILE_IDENTIFIER)
    except (struct.error, TypeError, ValueError, OverflowError, flatbuffers.builder.BuilderSizeError) as e:
        raise ExportError(
            "tflite file", "the model must fit the schema", e, "Correct the tensor or op that the reason names"
        ) from e
    return bytes(builder.Output())


class _Buffers:
    """The file's constants; buffer 0 is the empty one that computed tensors point to."""

    def __init__(self, s: ModuleType):
        class AlignedBuffer(s.BufferT):  # the generated Pack ignores the schema's force_align
            def Pack(self, builder: Any) -> int:  # noqa: N802 - the generated class's name
                if self.data is not None:
                    builder.StartVector(1, self.data.size, ALIGNMENT)
                    builder.head -= self.data.size
                    builder.Bytes[builder.head : builder.head + self.data.size] = memoryview(self.data)
                    vector = builder.EndVector()
                s.BufferStart(builder)
                if self.data is not None:
                    s.BufferAddData(builder, vector)
                return s.BufferEnd(builder)

        shared: dict[bytes, int] = {}  # zero points: 8 bytes a channel, and all but always the same zeros

        class Quantization(s.QuantizationParametersT):
            def Pack(self, builder: Any) -> int:  # noqa: N802 - the generated class's name
                scale, key = builder.CreateNumpyVector(self.scale), self.zeroPoint.tobytes()
                if key not in shared:
                    shared[key] = builder.CreateNumpyVector(self.zeroPoint)
                s.QuantizationParametersStart(builder)
                s.QuantizationParametersAddScale(builder, scale)
                s.QuantizationParametersAddZeroPoint(builder, shared[key])
                s.QuantizationParametersAddQuantizedDimension(builder, self.quantizedDimension)
                return s.QuantizationParametersEnd(builder)

        self.quantization = Quantization
        self._new = AlignedBuffer
        self._known: dict[bytes, int] = {}
        self.list: list[Any] = [AlignedBuffer()]
        self.size = 0

    def add(self, raw: np.ndarray) -> int:
        """The index of a buffer that holds these bytes (flat uint8)."""
        key = hashlib.sha256(raw).digest()
        if key not in self._known:
            self._known[key] = len(self.list)
            self.list.append(self._new(data=raw))
            self.size += raw.size + 4 * ALIGNMENT
        return self._known[key]


def _tensor_out(tensor: FileTensor, buffers: _Buffers) -> Any:
    s, where = schema(), f"tensor {tensor.name!r}"
    if tensor.dtype.upper() not in _enum("TensorType"):
        raise ExportError(where, "dtype must be one of the schema's", repr(tensor.dtype), "Use a dtype of the schema")
    quantization = None
    if tensor.scale is not None:
        zero = np.zeros(np.size(tensor.scale)) if tensor.zero_point is None else tensor.zero_point
        quantization = buffers.quantization(
            scale=np.array(tensor.scale, np.float32).reshape(-1),
            zeroPoint=np.array(zero, np.int64).reshape(-1),
            quantizedDimension=tensor.axis,
        )
    return s.TensorT(
        name=tensor.name,
        shape=list(map(int, tensor.shape)),
        type=_enum("TensorType")[tensor.dtype.upper()],
        buffer=0 if tensor.data is None else buffers.add(_raw(tensor, where)),
        quantization=quantization,
        isVariable=tensor.is_variable,
        shapeSignature=None if tensor.signature is None else list(map(int, tensor.signature)),
        hasRank=True,
    )


def _raw(tensor: FileTensor, where: str) -> np.ndarray:
    """The bytes of a constant, flat uint8."""
    data = np.ascontiguousarray(tensor.data)
    raw_type = tensor.dtype in RAW_BITS
    expected = np.dtype(np.uint8 if raw_type else np.int8 if tensor.dtype == "int4" else tensor.dtype)
    if data.dtype != expected or (not raw_type and np.shape(tensor.data) != tuple(tensor.shape)):
        received = f"{data.dtype} {np.shape(tensor.data)}"
        raise ExportError(
            where,
            f"its constant must be {expected} of shape {tuple(tensor.shape)}",
            received,
            "Convert the array to that dtype and shape",
        )
    if tensor.dtype == "int4":
        if data.size and (data.min() < -8 or data.max() > 7):
            raise ExportError(
                where, "int4 codes must lie in -8..7", f"{data.min()}..{data.max()}", "Store the codes as int8"
            )
        return pack_int4(data)
    return data.reshape(-1).view(np.uint8)


def _indices(indices: tuple[int, ...], count: int, where: str, low: int = 0) -> list[int]:
    for i in indices:
        if not low <= i < count:
            raise ExportError(
                where, f"tensor indices must lie in {low}..{count - 1}", i, "Add the tensor before the op that names it"
            )
    return list(map(int, indices))


def _op_out(op: FileOp, code: int, count: int) -> Any:
    s, where = schema(), f"op {op.opcode}"
    out = s.OperatorT(opcodeIndex=code)
    out.inputs = _indices(op.inputs, count, where, low=-1)
    out.outputs = _indices(op.outputs, count, where)
    if op.intermediates:
        out.intermediates = _indices(op.intermediates, count, where)
    if op.custom_options:
        out.customOptions = np.frombuffer(op.custom_options, np.uint8)
    if op.options is not None:
        name, fields = op.options
        first, second = _enum("BuiltinOptions"), _enum("BuiltinOptions2")
        if name not in first and name not in second:
            raise ExportError(
                where,
                f"options must be a class of the schema, such as {nearest(name, first)}",
                repr(name),
                "Use that spelling",
            )
        options = getattr(s, name + "T")()
        for key, value in fields.items():
            if key not in vars(options):
                raise ExportError(
                    where, f"{name} has the fields {sorted(vars(options))}", repr(key), "Use one of these fields"
                )
            setattr(options, key, value)
        if name in first:
            out.builtinOptionsType, out.builtinOptions = first[name], options
        else:
            out.builtinOptions2Type, out.builtinOptions2 = second[name], options
    return out


def _opcode_out(opcode: str, version: int) -> Any:
    kind, _, custom = opcode.partition(":")
    known = _enum("BuiltinOperator")
    if kind not in known or (kind == "CUSTOM") != bool(custom):
        raise ExportError(
            f"op {opcode}",
            f"an opcode must be in the schema, such as {nearest(kind, known)}",
            opcode,
            "Use a builtin op of the schema",
        )
    code = known[kind]
    old = min(code, LARGEST_OLD_OPCODE)
    return schema().OperatorCodeT(
        deprecatedBuiltinCode=old, builtinCode=code, version=version, customCode=custom or None
    )


def _signature_out(model: FileModel) -> list[Any] | None:
    s = schema()
    if not model.input_names and not model.output_names:
        return None
    sides = ((model.inputs, model.input_names, "input"), (model.outputs, model.output_names, "output"))
    for indices, names, side in sides:
        if len(indices) != len(names) or len(set(names)) != len(names):
            raise ExportError(
                f"signature {side}s",
                f"{len(indices)} different names",
                list(names),
                "Give every input and every output a name of its own",
            )
    maps = [[s.TensorMapT(name=n, tensorIndex=i) for i, n in zip(idx, names, strict=True)] for idx, names, _ in sides]
    return [s.SignatureDefT(inputs=maps[0], outputs=maps[1], signatureKey=SIGNATURE_KEY, subgraphIndex=0)]


# ---------------------------------------------------------------------------------------------------------- reading


def decode(data: bytes, where: str = "tflite file") -> FileModel:
    """The primary subgraph of a file's bytes; `where` names the file in errors.

    Raises:
        ArtifactError: not a TFLite file, truncated, or damaged (also: sparse, external or blockwise-quantized
            constants, which no integer op of ours reads).
    """
    return decode_all(data, where)[0]


def decode_all(data: bytes, where: str = "tflite file") -> list[FileModel]:
    """Every subgraph of a file's bytes, the primary one first; errors as `decode`."""
    from kquant.tflite.reader import Reader

    if len(data) < 8 or bytes(data[4:8]) != FILE_IDENTIFIER:
        what = "an empty file" if not data else f"{len(data)} bytes starting with {bytes(data[:8])!r}"
        raise ArtifactError(
            where,
            "a TFLite file is expected (identifier TFL3 at byte 4)",
            what,
            "Give the path of a .tflite file that was written whole",
        )
    try:
        return Reader(bytes(data), where).models()
    except KQuantError:
        raise
    except READER_ERRORS as e:
        raise ArtifactError(
            where, "the file cannot be read as a TFLite model", f"{type(e).__name__}: {e}", REWRITE
        ) from e
