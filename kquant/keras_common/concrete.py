"""A user's own code read with every size known, for a batch of one, and then for any batch.

Code that makes arrays of its own for the sizes of its input (positions, a class token for each sample) cannot run where
the batch is unknown. What it computes from its weights alone comes out of such a trace as plain arrays; which weights
they are shows in a trace with weights that are all different, where an array holds them in another order or shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.keras_common.copied import set_weights
from kquant.keras_common.generation import Call, Generation

FIRST, STEP, MOST = float(2**22), 0.5, 2**23  # of the marks: float32 holds each, and constants are seldom there
NEAR = 1e-4  # of the largest value: the order of float32 sums, in the check of what was read
SAMPLES = 2  # of that check: two show what a batch of one hides

Run = Callable[[Sequence[Any]], Any]


class UnreadError(ValueError):
    """Why a layer's own code was traced, and is not read."""


class Concrete:
    """A layer or model traced with a batch of one.

    Args:
        generation: of Keras.
        owner: the layer or model, built.
        run: calls it on values or symbolic tensors.
    """

    def __init__(self, generation: Generation, owner: Any, run: Run):
        self.generation, self.owner, self.run = generation, owner, run
        self.variables = [v for v in owner.trainable_variables if len(v.shape)]
        self.arrays: dict[bytes, Any] = {}
        self.met: dict[int, bytes] = {}
        self.read: set[int] = set()

    def form(self, shapes: Sequence[tuple[tuple, str]]) -> Any:
        """The functional form for any batch, of inputs of these shapes (with the batch) and dtypes.

        Raises:
            UnreadError: it computes something else than the owner does.
        """
        g = self.generation
        ones = [g.input((1, *shape[1:]), dtype) for shape, dtype in shapes]
        with self._marked():
            outputs = g.tree.flatten(self.run(ones))
            traced = g.keras.Model(ones, [y for y in outputs if g.is_symbolic(y)] or ones)
        inputs = [g.input((None, *shape[1:]), dtype) for shape, dtype in shapes]
        made = iter(self._again(traced, inputs))
        form = g.keras.Model(
            inputs, [next(made) if g.is_symbolic(y) else self._of_weights(y, inputs[0]) for y in outputs]
        )
        self._check(form, shapes)
        return form

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """With a number of its own in every weight."""
        values, next_ = self.owner.get_weights(), 0
        if sum(int(np.prod(v.shape)) for v in self.variables) > MOST:
            raise UnreadError("more weights than can be told apart")
        try:
            for variable in self.variables:
                size = int(np.prod(variable.shape))
                variable.assign((FIRST + STEP * np.arange(next_, next_ + size)).reshape(variable.shape))
                next_ += size
            yield
        finally:
            set_weights(self.owner, values)

    # -- the same calls for any batch ---------------------------------------------------------------------------------

    def _again(self, traced: Any, inputs: Sequence[Any]) -> list[Any]:
        known = {id(old): new for old, new in zip(traced.inputs, inputs, strict=True)}
        for call in self.generation.calls(traced):
            made = self.generation.tree.flatten(self._called(call, [known[id(t)] for t in call.inputs]))
            known.update(zip(map(id, call.outputs), made, strict=True))
        return [known[id(t)] for t in traced.outputs]

    def _called(self, call: Call, values: list[Any]) -> Any:
        g = self.generation
        name, args = g.operation(call) or ("", {})
        if name == "Reshape":
            return g.ops.reshape(values[0], (-1, *call.shape[1:]))
        if name == "BroadcastTo":
            return stretched(g.ops, values[0], call.shape)
        given, kwargs = g.tree.map_structure(self._weight, call.fill(values))
        if name == "Concatenate":
            xs = given[0] if given else next(iter(kwargs.values()))
            rank = len(call.shape)
            return g.ops.concatenate(_of_each_sample(g, xs, args["axis"] % rank), args["axis"])
        return call.layer(*given, **kwargs)

    def _weight(self, value: Any) -> Any:
        """The weights that an array of a call holds, as one variable; any other argument is itself."""
        g = self.generation
        if g.is_symbolic(value) or g.is_variable(value) or not isinstance(value, (np.ndarray, tf.Tensor)):
            return value
        array = np.asarray(value)
        marks = (np.asarray(array, np.float64) - FIRST) / STEP if array.dtype.kind == "f" else np.full(1, -1.0)
        if not array.size or marks.min() < 0 or (marks % 1).any() or marks.max() >= MOST:
            return value
        index = marks.astype(np.int64)
        for axis in range(index.ndim):  # what is the same all along an axis is one value, which broadcasts
            first = index.take([0], axis)
            index = first if (index == first).all() else index
        return self._variable(index)

    def _variable(self, index: np.ndarray) -> Any:
        key = repr(index.shape).encode() + index.tobytes()
        if key not in self.arrays:
            entries = index.ravel().tolist()
            if len(set(entries)) < len(entries) or any(self.met.setdefault(i, key) != key for i in entries):
                raise UnreadError("a weight that is in several places of the arrays that are computed from it")
            values = np.concatenate([np.ravel(v) for v in self.variables])[index]
            ends = np.cumsum([int(np.prod(v.shape)) for v in self.variables])
            owners = [self.variables[i] for i in np.unique(np.searchsorted(ends, index, side="right"))]
            self.read.update(map(id, owners))
            trainable = all(bool(v.trainable) for v in owners)
            self.arrays[key] = self.generation.variable(values, owners[0].name.partition(":")[0], trainable)
        return self.arrays[key]

    def _of_weights(self, array: Any, x: Any) -> Any:
        """An output that is an array: zero times a corner of an input, and the array."""
        ops, corner = self.generation.ops, x[(slice(None), *[slice(0, 1)] * (len(x.shape) - 1))]
        nothing = ops.multiply(ops.reshape(corner, (-1, *[1] * (len(array.shape) - 1))), 0.0)
        return ops.add(nothing, self._weight(array))

    # -- does it compute the same? ------------------------------------------------------------------------------------

    def _check(self, form: Any, shapes: Sequence[tuple[tuple, str]]) -> None:
        rng = np.random.default_rng(0)
        data = []
        for shape, dtype in shapes:
            size = (SAMPLES, *shape[1:])
            # From 0 to 1, because ids are floats too, and any table has the first.
            data.append(rng.random(size).astype(dtype) if "float" in dtype else rng.integers(0, 2, size, dtype))
        flat, tensors = self.generation.tree.flatten, [tf.constant(x) for x in data]
        for mine, theirs in zip(flat(form(data)), flat(self.run(tensors)), strict=True):
            a, b = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
            if a.shape != b.shape or np.abs(a - b).max(initial=0.0) > NEAR * np.abs(b).max(initial=1.0):
                raise UnreadError("what it computes at random, from its weights alone, or across samples is not read")


def stretched(ops: Any, x: Any, shape: Sequence[int]) -> Any:
    """A tensor repeated along axes of size 1; its samples stay."""
    repeats = [1, *(n if m == 1 else 1 for m, n in zip(tuple(x.shape)[1:], shape[1:], strict=True))]
    return x if max(repeats) == 1 else ops.tile(x, repeats)


def _of_each_sample(g: Generation, xs: Sequence[Any], axis: int) -> list[Any]:
    """Tensors to concatenate. An array among them becomes a tensor of each sample: zero times a slice of another."""
    first = next(x for x in xs if g.is_symbolic(x))
    nothing = first[(*([slice(None)] * axis), slice(0, 1))]
    return [x if g.is_symbolic(x) else g.ops.add(g.ops.multiply(nothing, 0.0), x) for x in xs]
