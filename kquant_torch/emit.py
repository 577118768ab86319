"""Write an integer model as TorchScript: the builder, and a function per op kind that gives its expression.

The program is one straight line of statements, an op each, with every scale, zero point and setting as a literal, so it
reads like the plan and `audit` and `verify` can read it too. Names are those of the trained tensors.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kquant.core.affine import Affine
from kquant.core.errors import RangeError, UnsupportedError
from kquant.core.integer import IntegerModel, IntOp
from kquant.core.target import Target
from kquant_torch.archive import MODULE, ROOT, Archive
from kquant_torch.runtime import FUNCTIONS

FORMAT = 1
SHIFT_OF_CODES = 128  # a code of the integer model is int8; the kernels take uint8
DTYPES = {"uint8": 0, "int8": 1, "int16": 2, "int32": 3, "int64": 4, "float32": 6, "float64": 7, "bool": 11}
RESERVED = {*keyword.kwlist, "self", "torch", "ops", "annotate", "inf", "nan", "zero", "training", "CONSTANTS", "print"}
SMALLEST_SHIFT = 8  # bits of a factor below the point; with fewer, rounding it would show in the codes

Writer = Callable[["Emitter", IntOp], str]
WRITERS: dict[str, Writer] = {}


def unsigned(codes: np.ndarray) -> np.ndarray:
    """int8 codes as uint8."""
    return (np.asarray(codes).astype(np.int16) + SHIFT_OF_CODES).astype(np.uint8)


@dataclass(frozen=True)
class Backend:
    """Whose kernels compute what needs one; anything else is moved, looked up or integer arithmetic on every backend.

    Args:
        target: its table.
        convolution, dense, channel_affine, add, mul: each gives the expression of a call of its kernel.
    """

    target: Target
    convolution: Callable[..., str]
    dense: Writer
    channel_affine: Writer
    add: Writer
    mul: Writer


def writes(*kinds: str) -> Callable[[Writer], Writer]:
    """Enter the function that gives the expression of some op kinds."""

    def enter(function: Writer) -> Writer:
        WRITERS.update(dict.fromkeys(kinds, function))
        return function

    return enter


def literal(value: Any) -> str:
    """A number, string, or list of them in TorchScript; floats to the last bit."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a setting must be finite")
        return repr(value)
    return repr(value)


class Emitter:
    """Collects the statements and arrays of one file."""

    def __init__(self, model: IntegerModel, backend: Backend):
        self.model, self.backend = model, backend
        self.names: dict[str, str] = {}
        self.taken: set[str] = set(RESERVED)
        self.lines: list[str] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.packed: dict[str, tuple[str, str]] = {}
        self.held: set[str] = set()
        self.whole: dict[str, str] = {}
        self.identities: dict[tuple[int, int], tuple[str, ...]] = {}
        self.readers = Counter(t for op in model.ops for t in op.inputs) + Counter(model.outputs)
        self.producers = {t: op for op in model.ops for t in op.outputs}
        self.functions: set[str] = set()

    # -- names and arrays -----------------------------------------------------------------------------------------

    def fresh(self, wanted: str) -> str:
        """An identifier like `wanted` that is not taken."""
        base = re.sub(r"\W", "_", wanted, flags=re.ASCII).strip("_") or "t"
        base = f"t_{base}" if base[0].isdigit() else base
        name, count = base, 1
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name

    def name(self, tensor: str) -> str:
        """The variable that holds a tensor of the model; a constant is an array of the file."""
        if tensor not in self.names:
            held = self.model.tensors[tensor]
            if held.constant is None:
                self.names[tensor] = self.fresh(tensor)
            else:
                codes = held.constant
                codes = unsigned(codes) if held.affine is not None else codes
                self.names[tensor] = self.array(tensor, codes)
        return self.names[tensor]

    def array(self, wanted: str, values: np.ndarray) -> str:
        """An array of the file; returns how a statement reads it."""
        name = self.fresh(wanted)
        self.arrays[name] = np.asarray(values, order="C")
        return f"self.{name}"

    def zero(self) -> str:
        """The zero point of every kernel."""
        self.arrays.setdefault("zero", np.zeros(1, np.int64))
        return "self.zero"

    def pack(self, wanted: str, expression: str, kind: str = "Tensor") -> str:
        """A prepacked kernel of a type, made when the file is loaded."""
        name = self.fresh(wanted)
        self.packed[name] = expression, kind
        return f"self.{name}"

    def affine(self, tensor: str) -> Affine:
        """The quantization of a tensor."""
        affine = self.model.tensors[tensor].affine
        assert affine is not None
        return affine

    def rank(self, tensor: str) -> int:
        """The number of axes of a tensor."""
        return len(self.model.tensors[tensor].shape)

    # -- pieces of expressions ------------------------------------------------------------------------------------

    def grid(self, tensor: str) -> tuple[float, int]:
        """Scale and zero point of a tensor as the kernels take them."""
        affine = self.affine(tensor)
        return float(affine.scale), affine.zero_point + SHIFT_OF_CODES

    def read(self, tensor: str) -> list[str]:
        """A tensor as the arguments value, scale, zero point."""
        return [self.codes(tensor), *map(literal, self.grid(tensor))]

    def codes(self, tensor: str) -> str:
        """A tensor as plain uint8 codes, or as it is where it has none."""
        name = self.name(tensor)
        if tensor not in self.held:
            return name
        self.whole[f"torch.int_repr({name})"] = name
        return f"torch.int_repr({name})"

    def quantized(self, source: list[str]) -> str:
        """A value, scale and zero point as a quantized tensor; one that already is, is not taken apart for it."""
        return self.whole.get(source[0]) or f"torch._make_per_tensor_quantized_tensor({', '.join(source)})"

    def holding(self, tensor: str, expression: str) -> str:
        """The expression of a tensor whose variable will hold a quantized tensor."""
        self.held.add(tensor)
        return expression

    def bounds(self, op: IntOp) -> tuple[int, int]:
        """The lowest and highest code that an op may give: of a low-bit output and of its fused ReLU."""
        affine = self.affine(op.outputs[0])
        low, high = affine.qmin, affine.qmax
        if op.relu:
            low = max(low, affine.zero_point)
        if op.relu_max is not None:
            high = min(high, int(affine.quantize(np.asarray(op.relu_max, np.float32))))
        return low + SHIFT_OF_CODES, high + SHIFT_OF_CODES

    def call(self, function: str, *arguments: Any) -> str:
        """A call of a function of the runtime."""
        self.functions.add(function)
        return f"{MODULE}.{function}({', '.join(a if isinstance(a, str) else literal(a) for a in arguments)})"

    def let(self, tensor: str, expression: str) -> None:
        """Append a statement; what the file gives out is plain."""
        if tensor in self.held and tensor in self.model.outputs:
            self.held.remove(tensor)
            expression = f"torch.int_repr({expression})"
        self.lines.append(f"{self.name(tensor)} = {expression}")

    # -- the file -------------------------------------------------------------------------------------------------

    def build(self) -> Archive:
        """The file as plain data."""
        for tensor, name in zip(self.model.inputs, self.model.input_names, strict=True):
            self.names[tensor] = self.fresh(name)
        for tensor in self.model.inputs:
            self._entry(tensor)
        for op in self.model.ops:
            if op.kind not in WRITERS:
                raise UnsupportedError(
                    f"op {op.id!r}",
                    "an op that this artifact has a kernel for",
                    op.kind,
                    "Exclude its layer, and export with allow_float=True",
                )
            self.let(op.outputs[0], WRITERS[op.kind](self, op))
        outputs = [self.name(t) for t in self.model.outputs]
        result = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
        kind = "Tensor" if len(outputs) == 1 else f"Tuple[{', '.join(['Tensor'] * len(outputs))}]"
        return Archive(self._source(result, kind), self.arrays, {f"{ROOT}.json": self._described()})

    def _entry(self, tensor: str) -> None:
        """Codes that come in as such are brought into the layout of the kernels."""
        if self.model.tensors[tensor].affine is not None and self.rank(tensor) == 4:
            name = self.name(tensor)
            self.lines.append(f"{name} = torch.contiguous({name}, memory_format=2)")

    def _described(self) -> str:
        tensors = {
            name: {"id": tensor, **self._grid_of(tensor)}
            for tensor, name in self.names.items()
            if not name.startswith("self.")
        }
        facts = {
            "format": FORMAT,
            "target": self.backend.target.name,
            "inputs": {n: self.names[t] for t, n in zip(self.model.inputs, self.model.input_names, strict=True)},
            "outputs": list(self.model.output_names),
            "tensors": tensors,
        }
        return json.dumps(facts, indent=1)

    def _grid_of(self, tensor: str) -> dict[str, Any]:
        held = self.model.tensors[tensor]
        shape = {"shape": list(held.shape)}
        if held.affine is None:
            return shape
        scale, zero_point = self.grid(tensor)
        return {**shape, "scale": scale, "zero_point": zero_point, "bits": held.affine.bits}

    def _source(self, result: str, kind: str) -> str:
        functions = [FUNCTIONS[n] for n in FUNCTIONS if n in self.functions]
        owner = f"{MODULE}.Artifact"
        kinds = {**dict.fromkeys(self.arrays, "Tensor"), **{n: kind for n, (_, kind) in self.packed.items()}}
        members = ["training : bool", *(f"{n} : {kind}" for n, kind in kinds.items())]
        held = ", ".join(f'"{n}": self.{n}' for n in self.arrays)
        state = f"{{{held}}}" if held else "annotate(Dict[str, Tensor], {})"
        arguments = "".join(f", {self.names[t]}: Tensor" for t in self.model.inputs)
        body = [
            "class Artifact(Module):",
            "  __parameters__ = []",
            "  __buffers__ = []",
            *(f"  {m}" for m in members),
            f"  def forward(self: {owner}{arguments}) -> {kind}:",
            *(f"    {line}" for line in self.lines),
            f"    return {result}",
            f"  def __getstate__(self: {owner}) -> Tuple[Dict[str, Tensor], bool]:",
            f"    return ({state}, self.training)",
            f"  def __setstate__(self: {owner}, state: Tuple[Dict[str, Tensor], bool]) -> NoneType:",
            "    self.training = state[1]",
            *(f'    self.{n} = state[0]["{n}"]' for n in self.arrays),
            *(f"    self.{n} = {expression}" for n, (expression, _) in self.packed.items()),
            "    return None",
        ]
        return "\n".join([*functions, "\n".join(body), ""])


def shift_for(ratio: float, bits: int, largest: int, tensor: str) -> int:
    """The bits below the point with which a factor `ratio` fits `bits` bits.

    Raises:
        RangeError: a ratio of scales so large that the factor could not be exact enough.
    """
    shift = min(largest, bits - math.ceil(math.log2(ratio)))
    if shift < SMALLEST_SHIFT:
        raise RangeError(
            f"tensor {tensor!r}",
            f"the scale of its op's inputs may be at most 2^{bits - SMALLEST_SHIFT} times its own",
            f"2^{math.log2(ratio):.1f}",
            "Calibrate on representative data, or leave the layer in float with `exclude`",
        )
    return shift


@writes("quantize")
def _quantize(e: Emitter, op: IntOp) -> str:
    expression = e.call("quantize", e.codes(op.inputs[0]), *e.grid(op.outputs[0]), *e.bounds(op))
    return f"torch.contiguous({expression}, memory_format=2)" if e.rank(op.outputs[0]) == 4 else expression


@writes("dequantize")
def _dequantize(e: Emitter, op: IntOp) -> str:
    return e.call("dequantize", *e.read(op.inputs[0]))


@writes("table")
def _table(e: Emitter, op: IntOp) -> str:
    assert op.table is not None
    table = e.array(f"{op.id}/table", unsigned(op.table))
    shape = op.attrs.get("offsets")
    if shape is None:
        return e.call("lookup", e.codes(op.inputs[0]), table)
    start = 256 * np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    return e.call("lookup_by_slope", e.codes(op.inputs[0]), table, e.array(f"{op.id}/start", start))


@writes("batch_matmul")
def _batch_matmul(e: Emitter, op: IntOp) -> str:
    a, b = op.inputs
    target = e.grid(op.outputs[0])
    shift = shift_for(e.grid(a)[0] * e.grid(b)[0] / target[0], 31, 40, op.outputs[0])
    return e.call("matmul", *e.read(a), *e.read(b), *target, *e.bounds(op), shift)


@writes("mean")
def _mean(e: Emitter, op: IntOp) -> str:
    dim, keepdim = list(op.attrs["dim"]), bool(op.attrs["keepdim"])
    return e.call("mean", *e.read(op.inputs[0]), *e.grid(op.outputs[0]), *e.bounds(op), dim, keepdim)


@writes("sum")
def _sum(e: Emitter, op: IntOp) -> str:
    target = e.grid(op.outputs[0])
    shift = shift_for(e.grid(op.inputs[0])[0] / target[0], 31, 40, op.outputs[0])
    dim, keepdim = list(op.attrs["dim"]), bool(op.attrs["keepdim"])
    return e.call("sum", *e.read(op.inputs[0]), *target, *e.bounds(op), dim, keepdim, shift)


@writes("softmax")
def _softmax(e: Emitter, op: IntOp) -> str:
    scale, _ = e.grid(op.inputs[0])
    beta = float(op.attrs.get("beta", 1.0))
    units = np.round(np.exp(-np.arange(256) * scale * beta) * 2.0**23).astype(np.int32)
    x, table, dim = e.codes(op.inputs[0]), e.array(f"{op.id}/table", units), int(op.attrs["dim"])
    if "mask" not in op.attrs:
        return e.call("softmax", x, table, dim)
    return e.call("masked_softmax", x, table, e.array(f"{op.id}/mask", op.attrs["mask"].astype(np.int32)), dim)
