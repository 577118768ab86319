"""Is the graph that was read the model? Both compute the same on a few samples, whatever the model is made of.

Verification compares the file with what was read, so nothing after this would notice a layer that was read as another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.errors import ModelError
from kquant.core.graph import Graph, walk
from kquant.keras_common.generation import Generation
from kquant.keras_common.reader import traced

ROWS = 2  # of the samples: one of positive numbers, such as logarithms need, and one of both signs
ANY = 32  # of an axis whose size is open: it can be halved five times
IDS = 2  # every table has the first two
# How far apart float values may be, of the largest one: the order of float32 sums, and 64 roundings of half precision.
NEAR = {"float16": 64 * 2.0**-11, "bfloat16": 64 * 2.0**-8}
NEAR_FLOAT32 = 1e-4
TINY = float(np.finfo(np.float32).tiny)


def confirm(generation: Generation, model: Any, graph: Graph) -> None:
    """Compare the model with the graph that was read of it, on random samples.

    What differs by no more than the model itself moves with inputs that differ by the same share is rounding. A model
    that cannot run on such samples, or that computes at random, is not compared.

    Raises:
        ModelError: they differ; names the first layer that does.
    """
    form = generation.functional(model)
    data = _samples(generation, form, graph)
    if data is None:
        return
    state = [np.asarray(v).copy() for v in model.non_trainable_variables]
    try:
        wrong = _Comparison(generation, model, form, data).wrong(graph)
    finally:
        for variable, value in zip(model.non_trainable_variables, state, strict=True):
            if not np.array_equal(np.asarray(variable), value):
                variable.assign(value)
    if wrong:
        raise ModelError(
            f"model {model.name!r}",
            "what is read of it must compute what it computes",
            wrong,
            "Write that part with Keras' own layers and operations, in a call() that is not overridden",
        )


def _samples(generation: Generation, form: Any, graph: Graph) -> list[np.ndarray] | None:
    """Random values for each input, as the model takes them; None where one takes no numbers."""
    rng = np.random.default_rng(0)
    rows = next((n for n in (generation.shape(t)[0] for t in form.inputs) if n), ROWS)
    made = []
    for tensor, name in zip(form.inputs, graph.inputs, strict=True):
        dtype, size = generation.dtype(tensor), (rows, *(n or ANY for n in generation.shape(tensor)[1:]))
        if dtype == "string":
            return None
        if "float" not in dtype or "int" in graph.tensors[name].dtype:
            made.append(rng.integers(0, IDS, size).astype(dtype))
            continue
        values = rng.normal(size=size)
        values[0] = rng.random(size[1:])
        made.append(values.astype("float32"))
    return made


def _distance(mine: Any, theirs: Any) -> float:
    """The largest difference, as a share of the largest value, where the model gives numbers at all."""
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    if mine.shape != theirs.shape:
        return float("inf")
    known = np.isfinite(theirs)
    if not np.isfinite(mine[known]).all():
        return float("inf")
    return float(np.abs(mine - theirs)[known].max(initial=0.0) / np.abs(theirs[known]).max(initial=TINY))


class _Comparison:
    """A model beside the graph that was read of it."""

    def __init__(self, generation: Generation, model: Any, form: Any, data: list[np.ndarray]):
        self.generation, self.model, self.form, self.data = generation, model, form, data
        types = {layer.compute_dtype for layer in model._flatten_layers()}
        self.near = max(NEAR_FLOAT32, *(NEAR.get(t, 0.0) for t in types))

    def wrong(self, graph: Graph) -> str:
        """What differs by more than rounding, or nothing."""
        try:
            theirs = self._run(self.model, self.data)
        except Exception:  # whatever a model says of numbers that it is not made for
            return ""
        values = self._values(graph)
        far = max(_distance(values[t], y) for t, y in zip(graph.outputs, theirs, strict=True))
        if far <= self.near or self._moves(theirs, self.data) > self.near:
            return ""
        moved = [x * np.float32(1 + self.near) if x.dtype.kind == "f" else x for x in self.data]
        if far <= self.near + self._moves(theirs, moved):
            return ""
        return f"{self._first()} that differs by {far:.2g} of the largest value"

    def _run(self, model: Any, data: list[np.ndarray]) -> list[Any]:
        tree = self.generation.tree
        given = self.generation.structures(self.form)[0]
        return list(tree.flatten(model(tree.pack_sequence_as(given, [tf.constant(x) for x in data]), training=False)))

    def _values(self, graph: Graph) -> dict[str, Any]:
        """Every tensor of the graph."""
        feeds = {n: tf.constant(x.astype(graph.tensors[n].dtype)) for n, x in zip(graph.inputs, self.data, strict=True)}
        values: dict[str, Any] = {t.id: t.constant for t in graph.tensors.values()} | feeds
        walk(graph, feeds, lambda op, inputs, outputs: values.update(zip(op.outputs, outputs, strict=True)))
        return values

    def _moves(self, theirs: list[Any], data: list[np.ndarray]) -> float:
        """How far the model's own outputs are from these with inputs that are nearly the same, or the same."""
        return max(_distance(y, z) for y, z in zip(self._run(self.model, data), theirs, strict=True))

    def _first(self) -> str:
        """The first layer whose outputs differ."""
        graph, form, places = traced(self.generation, self.model)
        places = [place for place in places if place[2] in graph.tensors]
        values = self._values(graph)
        inner = self._run(self.generation.keras.Model(form.inputs, [t for _, t, _ in places]), self.data)
        for (layer, _, tensor), theirs in zip(places, inner, strict=True):
            if values.get(tensor) is not None and _distance(values[tensor], theirs) > self.near:
                return f"layer {layer!r} as the first one"
        return "a call() of its own"
