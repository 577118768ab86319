"""The TorchScript of an artifact as data: read with `ast`, never run. Only the form that `emit` writes is accepted.

The one class has `forward`, a straight line of assignments; `__getstate__`; and `__setstate__`, which takes the arrays
and prepacks kernels. Functions of the runtime stand before it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kquant.core.errors import ArtifactError
from kquant_torch.archive import CLASS, FOREIGN, MODULE, Archive

# The parameters of kernels: `x`, `x_scale` and `x_zero_point` belong together, `scale` and `zero_point` to the output.
CONVOLUTION = (
    "x x_scale x_zero_point kernel kernel_scale kernel_zero bias stride padding dilation groups scale zero_point dtype"
    " attr scalars algorithm"
)
ACCUMULATING = (
    "x x_scale x_zero_point kernel kernel_scale kernel_zero accum bias stride padding dilation groups scale zero_point"
    " dtype accum_scale accum_zero_point binary_attr alpha attr scalars algorithm"
)
LINEAR = "x x_scale x_zero_point kernel kernel_scale kernel_zero bias scale zero_point dtype attr scalars algorithm"
PACKING = "kernel kernel_scale x_scale x_zero_point stride padding dilation groups x_shape"
SIGNATURES: dict[str, tuple[str, ...]] = {
    "ops.onednn.qconv_pointwise": tuple(CONVOLUTION.split()),
    "ops.onednn.qconv2d_pointwise": tuple(ACCUMULATING.split()),
    "ops.onednn.qlinear_pointwise": tuple(LINEAR.split()),
    "ops.onednn.qconv_prepack": tuple(PACKING.split()),
    "ops.onednn.qlinear_prepack": ("kernel", "shape"),
    "torch._make_per_tensor_quantized_tensor": ("x", "x_scale", "x_zero_point"),
}
QUANTIZED = {
    f"ops.quantized.{name}{relu}" for relu in ("", "_relu") for name in ("conv1d", "conv2d", "conv3d", "linear")
}
SIGNATURES |= dict.fromkeys(QUANTIZED, ("x", "kernel", "scale", "zero_point"))
SUMMED = {f"ops.quantized.{name}{relu}" for relu in ("", "_relu") for name in ("add", "mul")}
SIGNATURES |= dict.fromkeys(SUMMED, ("a", "b", "scale", "zero_point"))
RUNTIME = f"{MODULE}."
PREPACKING = {"ops.onednn.qconv_prepack", "ops.onednn.qlinear_prepack"}
PREPACKING |= {f"{RUNTIME}pack_{name}" for name in ("conv1d", "conv2d", "conv3d", "linear")}


@dataclass(frozen=True)
class Statement:
    """`name = expression`."""

    name: str
    expression: ast.expr


@dataclass(frozen=True)
class Program:
    """An artifact's code.

    Args:
        inputs: the arguments of `forward`.
        statements: its assignments.
        results: the variables that it returns.
        functions: the runtime's functions in the file, by name.
        packed: how `__setstate__` makes each prepacked kernel.
    """

    inputs: tuple[str, ...]
    statements: tuple[Statement, ...]
    results: tuple[str, ...]
    functions: Mapping[str, ast.FunctionDef]
    packed: Mapping[str, ast.Call]

    def signature(self, function: str) -> tuple[str, ...] | None:
        """The names of a function's parameters; None for one that has no scales."""
        if function.startswith(RUNTIME):
            definition = self.functions.get(function.removeprefix(RUNTIME))
            return None if definition is None else tuple(a.arg for a in definition.args.args)
        return SIGNATURES.get(function)

    def arguments(self, call: ast.Call) -> dict[str, ast.expr]:
        """The arguments of a call by name, of a function with a signature."""
        return dict(zip(self.signature(dotted(call.func)) or (), call.args, strict=False))

    def weights(self, call: ast.Call) -> dict[str, ast.expr]:
        """The arguments of a call with a kernel, and those with which the kernel was prepacked, by name."""
        arguments = self.arguments(call)
        packed = self.arguments(self.packed[dotted(arguments["kernel"]).removeprefix("self.")])
        return {**packed, **{n: a for n, a in arguments.items() if n != "kernel"}}

    def grids(self) -> dict[str, set[tuple[float, int]]]:
        """For each variable, every scale and zero point with which the code reads or writes it."""
        found: dict[str, set[tuple[float, int]]] = {}
        for statement in self.statements:
            for call in calls(statement.expression):
                arguments = self.arguments(call)
                for name, value in arguments.items():
                    if f"{name}_scale" in arguments and f"{name}_zero_point" in arguments:
                        grid = number(arguments[f"{name}_scale"]), number(arguments[f"{name}_zero_point"])
                        found.setdefault(variable(value), set()).add(grid)
                if "scale" in arguments:
                    grid = number(arguments["scale"]), number(arguments["zero_point"])
                    found.setdefault(statement.name, set()).add(grid)
        return found


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or an attribute."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    raise ValueError(f"a name is expected, not {type(node).__name__}")


def calls(expression: ast.expr) -> Iterator[ast.Call]:
    """The calls in an expression."""
    return (node for node in ast.walk(expression) if isinstance(node, ast.Call))


def variable(node: ast.expr) -> str:
    """The variable whose value, moved perhaps, an argument is; `self.x` for an array."""
    while isinstance(node, ast.Call):
        node = node.args[0]
    return dotted(node)


def number(node: ast.expr) -> float | int:
    """A literal number."""
    value = ast.literal_eval(node)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a number is expected, not {value!r}")
    return value


def parse(archive: Archive, where: str) -> Program:
    """The code of an archive.

    Raises:
        ArtifactError: code that `emit` does not write.
    """
    try:
        return _parsed(archive)
    except (ValueError, SyntaxError, TypeError, LookupError, RecursionError, MemoryError) as error:
        received = f"{type(error).__name__}: {error}"
        raise ArtifactError(where, "the code of an exported artifact", received, FOREIGN) from error


def _parsed(archive: Archive) -> Program:
    *functions, owner = ast.parse(archive.code).body
    if not isinstance(owner, ast.ClassDef) or owner.name != CLASS or not all(map(_is_function, functions)):
        raise ValueError(f"functions and the class {CLASS} are expected")
    methods = {m.name: m for m in owner.body if isinstance(m, ast.FunctionDef)}
    if set(methods) != {"forward", "__getstate__", "__setstate__"}:
        raise ValueError(f"forward, __getstate__ and __setstate__ are expected, not {sorted(methods)}")
    forward = methods["forward"]
    *body, last = forward.body
    if not isinstance(last, ast.Return) or last.value is None:
        raise ValueError("forward must end in a return")
    returned = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    return Program(
        tuple(a.arg for a in forward.args.args[1:]),
        tuple(map(_statement, body)),
        tuple(map(dotted, returned)),
        {f.name: f for f in functions if isinstance(f, ast.FunctionDef)},
        _packed(methods["__setstate__"], set(archive.tensors)),
    )


def _is_function(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef)


def _statement(node: ast.stmt) -> Statement:
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
        raise ValueError(f"line {node.lineno}: an assignment to one variable is expected")
    return Statement(node.targets[0].id, node.value)


def _packed(method: ast.FunctionDef, arrays: set[str]) -> dict[str, ast.Call]:
    """The prepacked kernels; each array must be taken from the state as it is."""
    found: dict[str, ast.Call] = {}
    taken = set()
    for node in method.body[:-1]:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            raise ValueError(f"line {node.lineno}: an assignment is expected")
        name = dotted(node.targets[0]).removeprefix("self.")
        source = ast.unparse(node.value)
        if isinstance(node.value, ast.Call) and dotted(node.value.func) in PREPACKING:
            found[name] = node.value
        elif name == "training" and source == "state[1]":
            continue
        elif source == f"state[0][{name!r}]" and name in arrays:
            taken.add(name)
        else:
            raise ValueError(f"line {node.lineno}: {source}")
    if taken != arrays:
        raise ValueError(f"arrays that __setstate__ does not take: {sorted(arrays - taken)[:4]}")
    return found


def array_of(node: ast.expr, archive: Archive) -> np.ndarray:
    """The array that an argument `self.name` is."""
    return archive.tensors[dotted(node).removeprefix("self.")]
