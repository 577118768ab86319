"""Recognize what the ops of a graph compute together: from a tensor to the op of the neutral graph that makes it.

Handlers are entered by graph op type. They look backwards from a tensor: a `BiasAdd` behind a convolution that nothing
else reads is that convolution with a bias, a product with a vector is a scale per channel, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.graph import Weight
from kquant.tf1 import marks
from kquant.tf1.evaluate import Evaluator
from kquant.tf1.flags import evaluated, handed_on, is_flag, is_handed_in, outside
from kquant.tf1.values import Values, variable_of


@dataclass(frozen=True)
class Kernel:
    """The kernel of a weighted op.

    Args:
        op, slot: the graph op that reads it, and as which input.
        tensor: what it reads: the float kernel, or in a quantized graph the fake-quantized one.
        axes: of that tensor that share a scale; None for one scale.
        view: how the neutral graph holds it: as it is, `"transposed"`, or a `"row"`, without its first axis of size 1.
    """

    op: Any
    slot: int
    tensor: Any
    axes: tuple[int, ...] | None
    view: str = ""

    def seen(self, array: np.ndarray) -> np.ndarray:
        """An array of the kernel's rank as the neutral graph holds it."""
        if self.view == "transposed":
            return np.transpose(array)
        return array.reshape(array.shape[1:]) if self.view == "row" else array

    def seen_axes(self) -> tuple[int, ...] | None:
        """The axes that share a scale, of the array as the neutral graph holds it."""
        if self.axes is None or not self.view:
            return self.axes
        return tuple(1 - a for a in self.axes) if self.view == "transposed" else tuple(a - 1 for a in self.axes if a)


@dataclass(frozen=True)
class Found:
    """An op of the neutral graph, in terms of the TensorFlow graph.

    Args:
        kind: a row of the operator table, or `opaque`.
        sources: the tensors it reads, or arrays where an operand is constant.
        output: the tensor it makes.
        anchor: the graph op that gives it its name and type.
        attrs: as in `kquant.core.graph.Op`.
        weights: as there.
        kernel: of a weighted op.
        aliases: names of further graph ops that it computes.
        call: where evaluating the graph's own nodes from `sources` to `output` is not it.
    """

    kind: str
    sources: tuple[Any, ...]
    output: Any
    anchor: Any
    attrs: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Weight] = field(default_factory=dict)
    kernel: Kernel | None = None
    aliases: tuple[str, ...] = ()
    call: Callable[..., list[Any]] | None = None

    def then(self, op: Any, **changes: Any) -> Found:
        """The same op with a further graph op in it, whose output is now its own."""
        return replace(self, output=op.outputs[0], aliases=(*self.aliases, op.name), **changes)


Handler = Callable[["Matcher", Any, int], "Found | str"]
HANDLERS: dict[str, Handler] = {}


def matches(*types: str) -> Callable[[Handler], Handler]:
    """Enter a handler `(matcher, op, output index) -> Found, or the reason why it has no integer form`."""

    def enter(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(types, handler))
        return handler

    return enter


class Matcher:
    """Matches tensors of one graph.

    Args:
        evaluator: evaluates parts of the graph.
        depends: names of the tensors that depend on data; the others are parameters.
        readers: whether a graph op belongs to what is being read, for "nothing else reads it".
    """

    def __init__(self, evaluator: Evaluator, depends: set[str], readers: Callable[[Any], bool]):
        self.evaluator, self.depends, self.readers = evaluator, depends, readers
        self.heights: dict[str, int] = {}  # of elementwise ops behind a tensor
        self.read_by: dict[str, Any] = {}  # of trained arrays that are operands, the op that reads one
        self._found: dict[str, Found] = {}

    def match(self, tensor: Any) -> Found:
        """What makes a tensor that depends on data."""
        from kquant.tf1 import match_affine, match_linear, match_ops  # noqa: F401  they enter their handlers

        if tensor.name not in self._found:
            self._found[tensor.name] = self._match(tensor)
        return self._found[tensor.name]

    def _match(self, tensor: Any) -> Found:
        op = tensor.op
        mark = marks.of(op)
        if evaluated(tensor) is not None:
            return self._chosen(tensor, evaluated(tensor))
        if mark is not None and mark["kind"] == marks.FAKE_QUANT:
            source = self.tensor(mark["input"])
            self.read_by.setdefault(source.name, self.read_by.get(tensor.name))
            return Found("fake_quant", (source,), tensor, op, {"mark": mark})
        if self.is_parameter(tensor):
            read = self.reader(tensor)
            anchor = self.read_by.get(tensor.name) or op
            return Found("parameter", (), tensor, anchor, call=lambda values, float_weights=False: [read()])
        if mark is not None and mark["kind"] in marks.TRANSPARENT:
            return replace(self.match(self.tensor(mark["input"])), output=tensor)
        if mark is not None and mark["kind"] in marks.REPLACING:
            return replace(self.match(op.inputs[0]), output=tensor)
        handler = HANDLERS.get(op.type)
        if handler is None:
            found: Found | str = f"{op.type} has no integer form on the target"
        elif not tensor.shape.rank:
            found = "its rank is not known, or it has no axes"
        else:
            found = handler(self, op, op.outputs.index(tensor))
        if isinstance(found, Found) and found.kind != "identity" and tensor.dtype.is_integer:
            found = f"{op.type} of integers: they are read as ids to look up, or as pixels to cast, as they come in"
        if isinstance(found, Found):
            return found
        sources = tuple(t for t in op.inputs if t.name in self.depends)
        return Found("opaque", sources, tensor, op, {"reason": found})

    def _chosen(self, tensor: Any, chosen: Any) -> Found:
        """What a flag decides: what evaluation makes of what is handed into the conditional."""
        handed = handed_on(tensor)
        if handed is not None:
            return Found("identity", (handed,), tensor, tensor.op, call=unchanged)
        found = self.match(chosen)
        sources = [s for s in found.sources if isinstance(s, tf.Tensor)]
        if found.kind not in ("identity", "channel_affine") or not all(is_handed_in(tensor, s) for s in sources):
            return self.of_a_flag(tensor)
        return replace(found, sources=tuple(map(outside, sources)), output=tensor)

    def of_a_flag(self, tensor: Any) -> Found:
        """A tensor on which a flag decides that is neither a batch norm nor dropout."""
        handed = tuple(t for t in tensor.op.inputs if t.name in self.depends)
        reason = "a flag may decide on batch norm and dropout only"
        return Found("opaque", handed, tensor, tensor.op, {"reason": reason, "flag": True})

    # -- used by the handlers -------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Any:
        """A tensor of the graph by name."""
        return self.evaluator.graph.get_tensor_by_name(name)

    def is_parameter(self, tensor: Any) -> bool:
        """Whether a tensor depends on variables and constants only."""
        return tensor.name not in self.depends

    def behind(self, tensor: Any) -> Any:
        """What a tensor is without a gradient quantization on it."""
        mark = marks.of(tensor.op, marks.GRADIENT)
        return tensor if mark is None else self.tensor(mark["input"])

    def static(self, tensor: Any) -> np.ndarray | None:
        """The value of a tensor that is constant, or None."""
        value = tf.get_static_value(tensor)
        if value is None and self.is_parameter(tensor) and not self.variables(tensor):
            value = self.evaluator.run({}, [tensor.name])[0]
        return value

    def variables(self, tensor: Any) -> set[str]:
        """Names of the variable ops that a parameter depends on, and of flags that are fed."""
        found, todo, seen = set(), [tensor], set()
        while todo:
            t = todo.pop()
            if t.name in seen:
                continue
            seen.add(t.name)
            variable = variable_of(t)
            if is_flag(t):
                found.add(t.op.name)
            elif t.name in self.evaluator.statistics or variable is not None:
                found.add(self.evaluator.statistics.get(t.name) or variable.name)
            else:
                chosen = evaluated(t)
                todo += list(t.op.inputs) if chosen is None else [chosen]
        return found

    def is_of_a_flag(self, parameter: Any) -> bool:
        """Whether a flag that is fed decides on a parameter, other than by a conditional."""
        graph = self.evaluator.graph
        return any(map(is_flag, (t for n in self.variables(parameter) for t in graph.get_operation_by_name(n).outputs)))

    def reader(self, tensor: Any, shape: tuple[int, ...] | None = None) -> Callable[[], np.ndarray]:
        """A function that evaluates a parameter, in its own shape or another."""

        def read() -> np.ndarray:
            value = np.asarray(self.evaluator.run({}, [tensor.name])[0])
            return value if shape is None else value.reshape(shape)

        return read

    def weight(self, tensor: Any, shape: tuple[int, ...] | None = None) -> Weight:
        """A parameter as a weight."""
        own = tuple(int(n) for n in tensor.shape) if shape is None else shape
        return Weight(own, self.reader(tensor, own))

    def value_of(self, tensor: Any) -> Any:
        """The value of a variable that is given by its handle; another tensor as it is."""
        variable = variable_of(tensor) if tensor.dtype == tf.resource else None
        return tensor if variable is None else Values(self.evaluator.graph).value_tensor(variable.name)

    def is_read_once(self, tensor: Any, reader: Any) -> bool:
        """Whether `reader` is the only op of what is being read that reads the tensor."""
        return all(op is reader for op in tensor.consumers() if self.readers(op))

    def channels(self, tensor: Any) -> int | None:
        """The size of the last axis, if it is known."""
        return None if not tensor.shape.rank else tensor.shape[-1]


def caller(evaluator: Evaluator, found: Found) -> Callable[..., list[Any]]:
    """The `call` of a found op: the graph's own nodes from its sources to its output."""
    float_kernel = {}
    if found.kernel is not None:
        mark = marks.of(found.kernel.tensor.op, marks.WEIGHT)
        float_kernel = {} if mark is None else {found.kernel.tensor.name: mark["kernel"]}

    def call(values: Any, float_weights: bool = False) -> list[Any]:
        feeds = {t.name: v for t, v in zip(found.sources, values, strict=True) if isinstance(t, tf.Tensor)}
        if any(map(is_symbolic, feeds.values())):
            return evaluator.inline(feeds, [found.output.name])
        feeds = {n: _as(v, evaluator.graph.get_tensor_by_name(n).dtype) for n, v in feeds.items()}
        return evaluator.run(feeds, [found.output.name], float_kernel if float_weights else None)

    return call


def unchanged(values: Any, float_weights: bool = False) -> list[Any]:
    """The `call` of what an op that acts in training only computes in inference."""
    return [values[0]]


def is_symbolic(value: Any) -> bool:
    """Whether a value is a tensor of a graph that is being built, rather than an array."""
    return isinstance(value, tf.Tensor) and not hasattr(value, "numpy")


def _as(value: Any, dtype: Any) -> np.ndarray:
    """Values in the dtype of the tensor that they are fed for (an integer input that holds numbers comes as float)."""
    return np.asarray(value).astype(dtype.as_numpy_dtype, copy=False)
