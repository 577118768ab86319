"""Reads the bytes of a `.tflite` file without trusting them; `flatbuffer.decode` is the way in.

A flatbuffer is offsets and lengths: damaged ones may point anywhere and claim any size. Every index is checked, and the
elements visited in all are bounded by the size of the file, so that no file makes the reader hang or crash.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kquant.core.errors import ArtifactError
from kquant.tflite.flatbuffer import (
    RAW_BITS,
    REWRITE,
    FileModel,
    FileOp,
    FileTensor,
    enum_names,
    schema,
    unpack_int4,
)

VISITS_PER_BYTE = 4  # an honest file needs one at most; a damaged one could send us over the same bytes again and again


class Reader:
    """One pass over the bytes of a file. Errors that are not ours (struct.error ...) are for the caller to name."""

    def __init__(self, data: bytes, where: str):
        self.where = where
        self._left = VISITS_PER_BYTE * len(data)
        self._model = schema().Model.GetRootAs(data, 0)
        codes = self._items(self._model.OperatorCodesLength, self._model.OperatorCodes)
        self._codes = [self._opcode(code) for code in codes]
        buffers = self._items(self._model.BuffersLength, self._model.Buffers)
        self._buffers = [self._buffer(b, i) for i, b in enumerate(buffers)]

    def models(self) -> list[FileModel]:
        """Every subgraph as a `FileModel`."""
        graphs = self._items(self._model.SubgraphsLength, self._model.Subgraphs)
        if not graphs:
            raise self._error("a model has at least one subgraph", 0)
        if self._model.ExternalBuffersLength():
            raise self._error("constants must lie in the file itself", "external buffers")
        metadata = self._metadata()
        description = (self._model.Description() or b"").decode()
        names = self._signatures(len(graphs))
        return [self._subgraph(g, names.get(i), metadata, description, len(graphs) - 1) for i, g in enumerate(graphs)]

    # -- helpers that spend the budget

    def _error(self, expected: str, received: object) -> ArtifactError:
        return ArtifactError(self.where, expected, received, REWRITE)

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise self._error("lengths must agree with the size of the file", "vectors longer than the file")

    def _items(self, length: Any, get: Any) -> list[Any]:
        count = length()
        self._spend(4 * count)
        return [get(i) for i in range(count)]

    def _array(self, table: Any, name: str) -> np.ndarray | None:
        if getattr(table, name + "IsNone")():
            return None
        array = getattr(table, name + "AsNumpy")()
        self._spend(array.size)
        return array

    def _ints(self, table: Any, name: str) -> tuple[int, ...]:
        array = self._array(table, name)
        return () if array is None else tuple(array.tolist())

    def _index(self, index: int, count: int, what: str, low: int = 0) -> int:
        if not low <= index < count:
            raise self._error(f"{what} must lie in {low}..{count - 1}", index)
        return index

    # -- the parts of a file

    def _opcode(self, code: Any) -> tuple[str, int]:
        # Files older than the wide field have 0 there; newer ones a placeholder in the narrow field (schema_utils.cc).
        number = max(code.DeprecatedBuiltinCode(), code.BuiltinCode())
        name = enum_names("BuiltinOperator").get(number)
        if name is None:
            raise self._error("an opcode must be known to the installed schema", number)
        custom = code.CustomCode()
        if name == "CUSTOM":
            name = f"CUSTOM:{(custom or b'?').decode()}"
        return name, code.Version()

    def _buffer(self, buffer: Any, index: int) -> np.ndarray | None:
        if buffer.Offset() > 1:  # 1 marks "none" in files that were prepared for appended buffers
            raise self._error("constants must lie in the flatbuffer", f"buffer {index} appended to the file")
        return self._array(buffer, "Data")

    def _metadata(self) -> dict[str, bytes]:
        found = {}
        for item in self._items(self._model.MetadataLength, self._model.Metadata):
            raw = self._buffers[self._index(item.Buffer(), len(self._buffers), "metadata buffer")]
            found[(item.Name() or b"").decode()] = b"" if raw is None else raw.tobytes()
        return found

    def _signatures(self, graphs: int) -> dict[int, tuple[list[tuple[int, str]], list[tuple[int, str]]]]:
        """By subgraph, (tensor index, name) of the inputs and of the outputs of its first signature."""
        found: dict[int, Any] = {}
        for item in self._items(self._model.SignatureDefsLength, self._model.SignatureDefs):
            graph = self._index(item.SubgraphIndex(), graphs, "signature subgraph")
            sides = (self._items(item.InputsLength, item.Inputs), self._items(item.OutputsLength, item.Outputs))
            found.setdefault(
                graph, tuple([(m.TensorIndex(), (m.Name() or b"").decode()) for m in side] for side in sides)
            )
        return found

    def _subgraph(self, graph: Any, names: Any, metadata: dict[str, bytes], description: str, others: int) -> FileModel:
        tables = self._items(graph.TensorsLength, graph.Tensors)
        count = len(tables)
        ops = [self._op(op, count) for op in self._items(graph.OperatorsLength, graph.Operators)]
        inputs, outputs = (
            tuple(self._index(i, count, f"a model {side.lower()[:-1]}") for i in self._ints(graph, side))
            for side in ("Inputs", "Outputs")
        )
        computed = {i for op in ops for i in op.outputs} | set(inputs)
        tensors = [self._tensor(t, i in computed) for i, t in enumerate(tables)]
        in_names, out_names = ((), ()) if names is None else names
        return FileModel(
            tensors, ops, inputs, outputs,
            () if names is None else self._names(inputs, in_names, tensors),
            () if names is None else self._names(outputs, out_names, tensors),
            metadata, description, others,
        )  # fmt: skip

    def _names(
        self, indices: tuple[int, ...], named: list[tuple[int, str]], tensors: list[FileTensor]
    ) -> tuple[str, ...]:
        """Signature names in the order of `indices`; a tensor that the signature leaves out goes by its own name."""
        left = list(named)
        names: list[str] = []
        for index in indices:
            pair = next((p for p in left if p[0] == index), None)
            if pair is not None:
                left.remove(pair)
            names.append(tensors[index].name if pair is None else pair[1])
        if len(set(names)) != len(names):
            raise self._error("signature names must differ", names)
        return tuple(names)

    def _op(self, op: Any, count: int) -> FileOp:
        opcode, version = self._codes[self._index(op.OpcodeIndex(), len(self._codes), "opcode index")]
        inputs = tuple(self._index(i, count, f"an input of {opcode}", -1) for i in self._ints(op, "Inputs"))
        outputs = tuple(self._index(i, count, f"an output of {opcode}") for i in self._ints(op, "Outputs"))
        inner = tuple(self._index(i, count, f"an intermediate of {opcode}") for i in self._ints(op, "Intermediates"))
        if op.LargeCustomOptionsOffset() > 1:
            raise self._error("custom options must lie in the flatbuffer", f"{opcode} has them appended to the file")
        custom = self._array(op, "CustomOptions")
        raw = b"" if custom is None else custom.tobytes()
        return FileOp(opcode, inputs, outputs, version, self._options(op), raw, inner)

    def _options(self, op: Any) -> tuple[str, dict[str, Any]] | None:
        s = schema()
        kind, creator, table, union = (
            op.BuiltinOptionsType(),
            s.BuiltinOptionsCreator,
            op.BuiltinOptions(),
            "BuiltinOptions",
        )
        if not kind:
            kind, creator, table = op.BuiltinOptions2Type(), s.BuiltinOptions2Creator, op.BuiltinOptions2()
            union = "BuiltinOptions2"
        if not kind or table is None:
            return None
        name, found = enum_names(union).get(kind), creator(kind, table)
        if found is None:
            raise self._error("builtin options must be known to the installed schema", f"{union} {kind}")
        fields = {k: v for k, v in vars(found).items() if v is not None}
        for key, value in fields.items():
            if isinstance(value, np.ndarray):
                self._spend(value.size)
                fields[key] = value.tolist()
            elif isinstance(value, bytes):
                fields[key] = value.decode()
        return str(name), fields

    def _tensor(self, tensor: Any, computed: bool) -> FileTensor:
        name = (tensor.Name() or b"").decode()
        dtype = enum_names("TensorType").get(tensor.Type())
        if dtype is None:
            raise self._error(f"tensor {name!r} must have a dtype known to the installed schema", tensor.Type())
        if tensor.Sparsity() is not None:
            raise self._error("constants must be dense", f"tensor {name!r} is sparse")
        shape = self._ints(tensor, "Shape")
        if min(shape, default=0) < 0:
            raise self._error(f"tensor {name!r} must have a shape without negative sizes", shape)
        raw = self._buffers[self._index(tensor.Buffer(), len(self._buffers), f"buffer of tensor {name!r}")]
        data = self._constant(name, dtype.lower(), shape, raw)
        if data is not None and data.size == 0 and computed:
            data = None  # converters give every computed tensor an empty buffer of its own
        scale, zero_point, axis = self._quantization(tensor.Quantization(), name)
        dynamic = None if tensor.ShapeSignatureIsNone() else self._ints(tensor, "ShapeSignature")
        return FileTensor(
            name, shape, dtype.lower(), data, scale, zero_point, axis, dynamic or None, bool(tensor.IsVariable())
        )

    def _constant(self, name: str, dtype: str, shape: tuple[int, ...], raw: np.ndarray | None) -> np.ndarray | None:
        count = math.prod(shape)
        if raw is None or (raw.size == 0 and count):
            return None
        bits = RAW_BITS[dtype] if dtype in RAW_BITS else 4 if dtype == "int4" else 8 * np.dtype(dtype).itemsize
        if bits is not None and raw.size != -(-count * bits // 8):
            received = f"{raw.size} bytes for {dtype} {list(shape)}"
            raise self._error(f"the constant {name!r} must have the size of its tensor", received)
        if dtype in RAW_BITS:
            return raw
        if dtype == "int4":
            self._spend(raw.size)  # packed codes are copied: many tensors on one buffer must not add up without bound
            return unpack_int4(raw, count).reshape(shape)
        return raw.view(dtype).reshape(shape)

    def _quantization(self, table: Any, name: str) -> tuple[np.ndarray | None, np.ndarray | None, int]:
        if table is None:
            return None, None, 0
        if table.DetailsType():
            raise self._error(f"tensor {name!r} must have an affine quantization", "custom or blockwise quantization")
        scale, zero_point = self._array(table, "Scale"), self._array(table, "ZeroPoint")
        if scale is None or not scale.size:
            return None, None, 0
        if zero_point is None or not zero_point.size:
            zero_point = np.zeros(scale.size, np.int64)
        return scale.astype(np.float32), zero_point.astype(np.int64), table.QuantizedDimension()
