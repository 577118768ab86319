"""What is integer in a TorchScript artifact and what is not, from the file alone: its code is read, never run.

Types are followed through the straight line of statements: codes are uint8, and a statement is integer if every
function in it is a known integer one, its text is ours, and what it reads is integer. Anything else is a float op.
"""

from __future__ import annotations

import ast
import functools
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from kquant.core.errors import ArtifactError
from kquant.core.files import read_bytes
from kquant.core.reports import AuditOp, AuditReport, FloatOp
from kquant_torch.archive import FOREIGN, Archive, decode
from kquant_torch.emit_float import CHANNEL_AXIS
from kquant_torch.program import (
    QUANTIZED,
    RUNTIME,
    SIGNATURES,
    SUMMED,
    Program,
    Statement,
    array_of,
    calls,
    dotted,
    parse,
    variable,
)  # fmt: skip
from kquant_torch.run import facts
from kquant_torch.runtime import FUNCTIONS

LEAST_TORCH = "2.13"  # the version whose kernels were measured
FLOATS = {"float16", "bfloat16", "float32", "float64"}
BOUNDARY = {"quantize": "uint8", "dequantize": "float32"}  # functions of the runtime, and what they give
# Functions of torch that move, compare or select codes and give what they are given.
MOVED = (
    "amax amin cat clamp clone constant_pad_nd contiguous index_select max_pool3d maximum minimum permute repeat"
    " reshape slice squeeze unsqueeze reflection_pad1d reflection_pad2d reflection_pad3d upsample_nearest1d"
    " upsample_nearest2d upsample_nearest3d"
)
MOVERS = {f"torch.{name}" for name in MOVED.split()} | {"ops.quantized.max_pool2d"}
# Between plain codes and quantized tensors, which carry their scale and zero point.
RETYPED = {"torch.int_repr": "uint8", "torch._make_per_tensor_quantized_tensor": "quint8"}
PLAIN = {"annotate", "torch.size", "torch.add"}  # of settings and sizes
WEIGHTED = {name for name, signature in SIGNATURES.items() if "x" in signature and "kernel" in signature}


def audit(path: str | os.PathLike[str]) -> AuditReport:
    """Read an exported TorchScript file and say what in it is integer.

    Args:
        path: the file.

    Returns:
        The report. MACs are those of convolutions, linear layers and matrix products, by the shapes of the example
        inputs, at batch 1.

    Raises:
        ArtifactError: no such file, or not a whole file of `export_torchscript`.
    """
    return audit_bytes(read_bytes(path), os.fspath(path))


def audit_bytes(data: bytes, path: str = "torchscript file") -> AuditReport:
    """`audit` of a file's bytes; `path` names them in the report and in errors."""
    where = f"artifact {path!r}"
    archive = decode(data, where)
    program = parse(archive, where)
    try:
        view = _View(archive, program, facts(archive, where)["tensors"])
        rows = [view.row(s) for s in program.statements]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(where, "the code of an exported artifact", str(error), FOREIGN) from error
    floats = view.floats()
    macs = sum(row.macs for row in rows)
    integer_macs = sum(row.macs for row in rows if not FLOATS & {*row.inputs, row.output})
    return AuditReport(
        path=path,
        fully_integer=not floats,
        integer_mac_fraction=integer_macs / macs if macs else float(not floats),
        float_ops=floats,
        ops=rows,
        macs=macs,
        file_bytes=len(data),
        least_runtime=LEAST_TORCH,
        op_counts=dict(Counter(row.kind for row in rows)),
        runtime="torch",
    )


@functools.cache
def _own_functions() -> dict[str, str]:
    return {name: ast.dump(ast.parse(text).body[0]) for name, text in FUNCTIONS.items()}


class _View:
    """Follows the types of an artifact's variables."""

    def __init__(self, archive: Archive, program: Program, described: dict[str, Any]):
        self.archive, self.program, self.described = archive, program, described
        self.changed = {
            name for name, node in program.functions.items() if ast.dump(node) != _own_functions().get(name)
        }
        self.types: dict[str, str] = {f"self.{n}": str(a.dtype) for n, a in archive.tensors.items()}
        self.causes: dict[str, str] = {}
        self.types |= {f"self.{n}": self._packed_type(call) for n, call in program.packed.items()}
        self.types |= {name: self._input_type(name) for name in program.inputs}
        self.order = [s.name for s in program.statements]
        for statement in program.statements:
            self.types[statement.name] = self._type(statement.expression, statement.name)

    def _packed_type(self, call: ast.Call) -> str:
        """The dtype of the codes in a kernel; what a function that is not ours makes of them, nobody knows."""
        if dotted(call.func).removeprefix(RUNTIME) in self.changed:
            return "float32"
        return str(array_of(self.program.arguments(call)["kernel"], self.archive).dtype)

    def _input_type(self, name: str) -> str:
        """A model input is float where it is quantized, and codes or ids where it is not."""
        readers = [c for s in self.program.statements for c in calls(s.expression) if name in _names(c.args)]
        return "float32" if any(dotted(c.func) == f"{RUNTIME}quantize" for c in readers) else "uint8"

    # -- types ----------------------------------------------------------------------------------------------------

    def _type(self, node: ast.expr, owner: str) -> str:
        """The dtype of an expression; a reason to call it float is kept under the statement's name."""
        if isinstance(node, ast.Name | ast.Attribute):
            name = dotted(node)
            if name not in self.types:
                raise ValueError(f"{owner}: the variable {name} has no value")
            return self.types[name]
        if isinstance(node, ast.List | ast.Tuple):
            types = {self._type(item, owner) for item in node.elts if not isinstance(item, ast.Constant)}
            return _joined(types)
        if isinstance(node, ast.Call):
            return self._call_type(node, owner)
        raise ValueError(f"{owner}: {ast.unparse(node)[:60]} is not a call or a variable")

    def _call_type(self, call: ast.Call, owner: str) -> str:
        function = dotted(call.func)
        given = _joined({self._type(a, owner) for a in self._tensor_arguments(call)})
        name = function.removeprefix(RUNTIME)
        if function.startswith(RUNTIME) and name in self.changed:
            self.causes[owner] = f"the function {name} is not the one that kquant writes"
            return "float32"
        if function.startswith(RUNTIME) and name in BOUNDARY:
            return self._boundary(name, call, owner)
        if function in RETYPED:
            if given in FLOATS:
                self.causes[owner] = f"{_kind(function)} reads float values"
            return RETYPED[function]
        if function in WEIGHTED | SUMMED or (function.startswith(RUNTIME) and name in FUNCTIONS):
            if given in FLOATS:
                self.causes[owner] = f"{_kind(function)} reads float values"
            written = self.program.arguments(call).get("dtype", ast.Constant(0))
            codes = "quint8" if function in QUANTIZED | SUMMED else "uint8"
            return codes if isinstance(written, ast.Constant) and written.value == 0 else "float32"
        if function in MOVERS:
            return given
        self.causes[owner] = f"{_kind(function)} is not an integer kernel"
        return "float32"

    def _tensor_arguments(self, call: ast.Call) -> list[ast.expr]:
        """What a call reads from variables and arrays; the scales and biases of a kernel are its parameters."""
        arguments = self.program.arguments(call)
        parameters = {"kernel_scale", "kernel_zero", "bias", "scalars", "table", "start", "constant", "factor"}
        given = [a for n, a in arguments.items() if n not in parameters] if arguments else list(call.args)
        return [a for a in given if _reads(a)]

    def _boundary(self, name: str, call: ast.Call, owner: str) -> str:
        source = variable(call.args[0])
        if name == "quantize" and source not in self.program.inputs:
            self.causes.setdefault(owner, "it quantizes a float value inside the model")
        if name == "dequantize" and owner not in self.program.results:
            self.causes.setdefault(owner, "it gives a float value inside the model")
        return BOUNDARY[name]

    # -- rows -----------------------------------------------------------------------------------------------------

    def row(self, statement: Statement) -> AuditOp:
        """The report's row of a statement."""
        main = self._main(statement)
        kernel = self.program.arguments(main).get("kernel") if isinstance(main, ast.Call) else None
        reads = dict.fromkeys(n for n in _names([statement.expression]) if n in self.types)
        held = [n.removeprefix("self.") for n in reads if n.startswith("self.")]
        packed = (self.program.packed[n].args for n in held if n in self.program.packed)
        used = [*held, *(n.removeprefix("self.") for nodes in packed for n in _names(nodes))]
        arrays = set(used) & set(self.archive.tensors)
        codes = None if kernel is None else self.archive.tensors[self._array_name(dotted(kernel)[5:])]
        dtypes = tuple(self.types[n] for n in reads if not n.startswith("self."))
        return AuditOp(
            self._name(statement.name), _kind(dotted(main.func)) if isinstance(main, ast.Call) else "alias",
            dtypes if codes is None else (*dtypes, str(codes.dtype)), self.types[statement.name],
            "-" if codes is None else self._granularity(main), None if codes is None else 8 * codes.itemsize,
            sum(self.archive.tensors[n].nbytes for n in arrays), self._macs(statement, main, codes),
        )  # fmt: skip

    def _main(self, statement: Statement) -> Any:
        """The call that computes, rather than the ones that move its input or its result."""
        found = list(calls(statement.expression))
        moving = {*MOVERS, *PLAIN, *RETYPED, f"{RUNTIME}spread"}
        computing = [c for c in found if dotted(c.func) not in moving]
        return (computing or found or [None])[0]

    def _array_name(self, name: str) -> str:
        call = self.program.packed.get(name)
        return name if call is None else dotted(self.program.arguments(call)["kernel"]).removeprefix("self.")

    def _granularity(self, main: ast.Call) -> str:
        scale = array_of(self.program.weights(main)["kernel_scale"], self.archive)
        return "per-channel" if (scale != scale.flat[0]).any() else "per-tensor"

    def _macs(self, statement: Statement, main: Any, codes: np.ndarray | None) -> int:
        shape = self.described.get(statement.name, {}).get("shape", [])
        outputs = math.prod(n for n in shape[1:] if n is not None)
        arguments = self.program.arguments(main) if isinstance(main, ast.Call) else {}
        is_sum = "accum" in arguments and not _reads(arguments["bias"])  # an identity kernel, which has no bias
        if codes is not None and not is_sum:
            return outputs * (codes.size // max(codes.shape[0], 1))
        axis = CHANNEL_AXIS.get(dotted(main.func)) if isinstance(main, ast.Call) else None
        if axis is not None:
            values = array_of(main.args[1], self.archive)
            return outputs * (values.size // max(values.shape[axis], 1))
        if isinstance(main, ast.Call) and dotted(main.func) == f"{RUNTIME}matmul":
            inner = self.described.get(variable(main.args[0]), {}).get("shape", [0])[-1]
            return outputs * int(inner or 0)
        return 0

    def _name(self, variable: str) -> str:
        return str(self.described.get(variable, {}).get("id", variable))

    def floats(self) -> list[FloatOp]:
        """What is not integer, each with its cause."""
        found = []
        for statement in self.program.statements:
            cause = self.causes.get(statement.name)
            main = self._main(statement)
            if cause is None and self.types[statement.name] in FLOATS and not self._ends_model(main, statement):
                cause = "it moves float values"
            if cause is not None:
                found.append(FloatOp(self._name(statement.name), _kind(dotted(main.func)), cause))
        return found

    def _ends_model(self, main: Any, statement: Statement) -> bool:
        is_dequantize = isinstance(main, ast.Call) and dotted(main.func) == f"{RUNTIME}dequantize"
        return is_dequantize and statement.name in self.program.results


def _kind(function: str) -> str:
    """A function in torch's notation: `onednn::qconv_pointwise`, `kquant::add`, `aten::reshape`."""
    if function.startswith(RUNTIME):
        return f"kquant::{function.removeprefix(RUNTIME)}"
    return function.removeprefix("ops.").replace("torch.", "aten.", 1).replace(".", "::", 1)


def _names(nodes: list[Any]) -> Iterator[str]:
    """Variables and arrays in expressions, in order."""
    for node in nodes:
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield dotted(node)
        elif isinstance(node, ast.Call):
            yield from _names(node.args)
        elif isinstance(node, ast.List | ast.Tuple):
            yield from _names(node.elts)


def _reads(node: ast.expr) -> bool:
    """Whether an argument is a tensor: a variable, an array, or a call or list of such."""
    if isinstance(node, ast.Call):
        return dotted(node.func) not in PLAIN
    if isinstance(node, ast.List | ast.Tuple):
        return any(map(_reads, node.elts))
    return isinstance(node, ast.Name | ast.Attribute)


def _joined(types: set[str]) -> str:
    """The dtype of what is made from several: float if any is."""
    return next((t for t in sorted(types) if t in FLOATS), "uint8" if "uint8" in types else min(types, default="-"))
