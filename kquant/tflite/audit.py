"""What is integer in a `.tflite` file and what is not, from the file alone: nothing is run."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence

from kquant.core.errors import ArtifactError
from kquant.core.files import read_bytes
from kquant.core.reports import AuditOp, AuditReport, FloatOp
from kquant.tflite.flatbuffer import RAW_BITS, FileModel, FileOp, FileTensor, decode_all
from kquant.tflite.versions import least_runtime

FLOATS = {"float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"}
BITS = {"bool": 8, "int4": 4} | {k: v for k, v in RAW_BITS.items() if v}
BITS |= {f"{kind}{bits}": bits for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
BITS |= {"float16": 16, "float32": 32, "float64": 64, "complex64": 64, "complex128": 128}

# A row per MAC op: the input that holds the activations, the one that holds the weights, the weights' output channel
# axis (schema.fbs and the kernels' sources; TRANSPOSE_CONV's input 0 is the output shape).
MAC_OPS: dict[str, tuple[int, int, int]] = {
    "CONV_2D": (0, 1, 0),
    "DEPTHWISE_CONV_2D": (0, 1, 3),
    "TRANSPOSE_CONV": (2, 1, 0),
    "FULLY_CONNECTED": (0, 1, 0),
    "BATCH_MATMUL": (0, 1, -1),
    "CONV_3D": (0, 1, 4),
    "CONV_3D_TRANSPOSE": (2, 1, 3),
}
Shape = tuple[int, ...]
# MACs by (activation shape, weight shape, output shape, op), the batch included.
MAC_RULES: dict[str, Callable[[Shape, Shape, Shape, FileOp], int]] = {
    "CONV_2D": lambda x, w, y, op: math.prod(y) * math.prod(w[1:]),
    "DEPTHWISE_CONV_2D": lambda x, w, y, op: math.prod(y) * w[1] * w[2],
    "TRANSPOSE_CONV": lambda x, w, y, op: math.prod(x) * math.prod(w[:3]),
    "FULLY_CONNECTED": lambda x, w, y, op: math.prod(y) * w[-1],
    "BATCH_MATMUL": lambda x, w, y, op: math.prod(y) * x[-2 if (op.options or ("", {}))[1].get("adjX") else -1],
    "CONV_3D": lambda x, w, y, op: math.prod(y) * math.prod(w[:4]),
    "CONV_3D_TRANSPOSE": lambda x, w, y, op: math.prod(x) * math.prod(w[:4]),
}


def audit(path: str | os.PathLike[str]) -> AuditReport:
    """Read a `.tflite` file and say what in it is integer. All subgraphs count.

    Args:
        path: the file.

    Returns:
        The report. MACs are those of CONV_2D, DEPTHWISE_CONV_2D, TRANSPOSE_CONV, FULLY_CONNECTED, BATCH_MATMUL, CONV_3D
        and CONV_3D_TRANSPOSE, by the shapes in the file, at batch 1.

    Raises:
        ArtifactError: no such file, a folder, or not a whole TFLite file.
    """
    data = read_bytes(path)
    return audit_bytes(data, os.fspath(path))


def audit_bytes(data: bytes, path: str = "tflite file") -> AuditReport:
    """`audit` of a file's bytes; `path` names them in the report and in errors."""
    where = f"artifact {path!r}"
    models = decode_all(data, where)
    views = [_Subgraph(m, where, entry=i == 0 or bool(m.input_names or m.output_names)) for i, m in enumerate(models)]
    ops = [row for view in views for row in view.rows()]
    floats = [row for view in views for row in view.float_ops()]
    macs = sum(row.macs for row in ops)
    integer_macs = sum(view.integer_macs() for view in views)
    return AuditReport(
        path=path,
        fully_integer=not floats,
        integer_mac_fraction=integer_macs / macs if macs else float(not floats),
        float_ops=floats,
        ops=ops,
        macs=macs,
        file_bytes=len(data),
        least_runtime=least_runtime((op.opcode, op.version) for m in models for op in m.ops),
        op_counts=dict(Counter(op.opcode for m in models for op in m.ops)),
    )


class _Subgraph:
    """One subgraph; `entry` where its inputs and outputs are the model's."""

    def __init__(self, model: FileModel, where: str, entry: bool):
        self.model, self.where = model, where
        self.inputs = set(model.inputs) if entry else set()
        self.outputs = set(model.outputs) if entry else set()
        self.producer = {t: op for op in model.ops for t in op.outputs}
        first = model.tensors[model.inputs[0]].shape if model.inputs else ()
        self.batch = max(first[0], 1) if len(first) > 1 else 1
        users: dict[int, list[FileOp]] = {}
        for op in model.ops:
            for t in op.inputs:
                users.setdefault(t, []).append(op)
        self.users = users

    def rows(self) -> list[AuditOp]:
        """A row per op."""
        return [self._row(op) for op in self.model.ops]

    def _row(self, op: FileOp) -> AuditOp:
        tensors = self.model.tensors
        dtypes = tuple(t.dtype for t in self._tensors(op.inputs))
        output = tensors[op.outputs[0]].dtype if op.outputs else "-"
        constants = sum(_nbytes(tensors[i]) for i in set(op.inputs) - {-1})
        bits, macs = self._weight_bits(op), self._macs(op)
        return AuditOp(self._name(op), op.opcode, dtypes, output, self._granularity(op), bits, constants, macs)

    def integer_macs(self) -> int:
        """MACs of the ops whose activations, weights and output are all integer."""
        total = 0
        for op in self.model.ops:
            if op.opcode in MAC_OPS:
                x, w = self._operands(op)
                y = self.model.tensors[op.outputs[0]]
                total += 0 if {x.dtype, w.dtype, y.dtype} & FLOATS else self._macs(op)
        return total

    def float_ops(self) -> list[FloatOp]:
        """What is not integer: ops, then float tensors that no such op explains."""
        wrong = {i for i, t in enumerate(self.model.tensors) if t.dtype in FLOATS and not self._at_boundary(i)}
        found, explained = [], set()
        for op in self.model.ops:
            cause = self._cause(op, wrong)
            if cause:
                found.append(FloatOp(self._name(op), op.opcode, cause))
                explained |= {*op.inputs, *op.outputs}
        for i in sorted(wrong - explained):
            tensor = self.model.tensors[i]
            found.append(FloatOp(tensor.name, "tensor", f"{tensor.dtype} tensor that no QUANTIZE or DEQUANTIZE bounds"))
        return found

    def _at_boundary(self, index: int) -> bool:
        """A float model input that only QUANTIZE reads, or a model output that DEQUANTIZE writes for nobody else."""
        users = self.users.get(index, [])
        if index in self.inputs:
            return index not in self.outputs and all(op.opcode == "QUANTIZE" for op in users)
        producer = self.producer.get(index)
        return index in self.outputs and not users and producer is not None and producer.opcode == "DEQUANTIZE"

    def _cause(self, op: FileOp, wrong: set[int]) -> str | None:
        if op.opcode.startswith("CUSTOM:"):
            return "flex op" if op.opcode.startswith("CUSTOM:Flex") else "custom op"
        reads, writes = [i for i in op.inputs if i in wrong], [i for i in op.outputs if i in wrong]
        if op.opcode == "QUANTIZE" and set(reads) <= self.inputs:
            reads = []  # it stands at the boundary; the op that reads the same input in float is the cause
        if op.opcode == "DEQUANTIZE" and set(writes) <= self.outputs:
            writes = []
        if not reads and not writes:
            return None
        tensors = self.model.tensors
        if not reads:
            source = tensors[op.inputs[0]] if op.opcode == "DEQUANTIZE" and op.inputs else None
            kind = tensors[writes[0]].dtype
            if source is not None and source.data is not None:
                return f"weight-only: {source.dtype} constant dequantized to {kind}"
            return f"output {kind}" if source is None else f"dequantizes to {kind} inside the model"
        return self._float_input_cause(op, reads)

    def _float_input_cause(self, op: FileOp, reads: list[int]) -> str:
        tensors = self.model.tensors
        activations = [tensors[i] for i in reads if tensors[i].data is None]
        if not activations:
            return f"constant {tensors[reads[0]].dtype}"
        kind = activations[0].dtype
        weights = [t for t in self._tensors(op.inputs) if t.data is not None and t.scale is not None]
        if weights:
            return f"hybrid: {weights[0].dtype} weights with {kind} activations"
        if op.opcode in MAC_OPS:
            made_by = self.producer.get(op.inputs[MAC_OPS[op.opcode][1]])
            if made_by is not None and made_by.opcode == "DEQUANTIZE" and tensors[made_by.inputs[0]].data is not None:
                stored = tensors[made_by.inputs[0]].dtype
                return f"weight-only: {stored} weights dequantized, {kind} activations"
        if op.opcode == "QUANTIZE":
            return f"quantizes a {kind} value computed inside the model"
        return f"activation input {kind}"

    def _name(self, op: FileOp) -> str:
        return self.model.tensors[op.outputs[0]].name if op.outputs else op.opcode

    def _tensors(self, indices: Sequence[int]) -> list[FileTensor]:
        return [self.model.tensors[i] for i in indices if i >= 0]

    def _operands(self, op: FileOp) -> tuple[FileTensor, FileTensor]:
        """Activations and weights of a MAC op."""
        x, w, _ = MAC_OPS[op.opcode]
        if len(op.inputs) <= max(x, w) or min(op.inputs[x], op.inputs[w]) < 0 or not op.outputs:
            raise ArtifactError(
                self.where,
                f"{op.opcode} needs activations, weights and an output",
                op.inputs,
                "The file is damaged: write or download it again",
            )
        return self.model.tensors[op.inputs[x]], self.model.tensors[op.inputs[w]]

    def _weights(self, op: FileOp) -> FileTensor | None:
        """A MAC op's weights, else the first quantized constant (an embedding, a PReLU's slopes)."""
        if op.opcode in MAC_OPS:
            return self._operands(op)[1]
        constants = (t for t in self._tensors(op.inputs) if t.data is not None and t.scale is not None)
        return next(constants, None)

    def _weight_bits(self, op: FileOp) -> int | None:
        weights = self._weights(op)
        return None if weights is None else BITS.get(weights.dtype)

    def _granularity(self, op: FileOp) -> str:
        weights = self._weights(op)
        if weights is None or weights.scale is None:
            return "-"
        axis = MAC_OPS.get(op.opcode, (0, 0, 0))[2]
        channels = weights.shape[axis] if op.opcode in MAC_OPS and -1 < axis < len(weights.shape) else None
        return "per-channel" if weights.scale.size > 1 or channels == 1 else "per-tensor"

    def _macs(self, op: FileOp) -> int:
        if op.opcode not in MAC_OPS:
            return 0
        x, w = self._operands(op)
        y = self.model.tensors[op.outputs[0]]
        try:
            macs = MAC_RULES[op.opcode](x.shape, w.shape, y.shape, op)
        except IndexError:
            received = f"{list(x.shape)}, {list(w.shape)}"
            raise ArtifactError(
                self.where,
                f"{op.opcode} needs shapes of the right rank",
                received,
                "The file is damaged: write or download it again",
            ) from None
        return macs // self.batch if y.shape and y.shape[0] % self.batch == 0 else macs


def _nbytes(tensor: FileTensor) -> int:
    """Bytes of a constant as it lies in the file."""
    if tensor.data is None:
        return 0
    return -(-tensor.data.size // 2) if tensor.dtype == "int4" else tensor.data.nbytes
