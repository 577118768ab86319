"""Read a TensorFlow 1 graph into the neutral graph, from its outputs back to its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import tensorflow as tf

from kquant.core.errors import ModelError
from kquant.core.graph import Graph, Op, Tensor
from kquant.tf1 import marks
from kquant.tf1.evaluate import Evaluator
from kquant.tf1.flags import decides_on_more, is_flag
from kquant.tf1.graphs import GraphModel, as_model, remembered, tensor_id
from kquant.tf1.match import Found, Matcher, caller
from kquant.tf1.norms import batch_norm_of
from kquant.tf1.quantizers import RangeState, is_waiting
from kquant.tf1.region import SOURCES, find
from kquant.tf1.rewire import parts
from kquant.tf1.statistics import dependents, moving_averages
from kquant.tf1.write_out import can, copied, write_out, written_out

NAME = "graph"


def matcher_of(model: GraphModel, inputs: Any = (), readers: Callable[[Any], bool] = lambda op: True) -> Matcher:
    """A matcher for a graph whose data comes in at `inputs`, or where data can come from at all."""
    found = [t for op in model.graph.get_operations() if op.type in SOURCES for t in op.outputs]
    sources = [*inputs, *(t for t in found if not is_flag(t))]
    statistics = moving_averages(model.graph, dependents(sources))
    # Behind the moving averages that stand for batch statistics there are only variables.
    depends = dependents(sources, statistics)
    return Matcher(Evaluator(model.graph, model.values, statistics), depends, readers)


def complete(model: GraphModel) -> GraphModel:
    """The model with its inputs and outputs: as given, as remembered from when it was quantized, or found."""
    kept = remembered(model.graph)
    if kept is not None:
        model = replace(
            model,
            inputs=model.inputs or kept["inputs"],
            outputs=model.outputs or kept["outputs"],
            training=kept["training"],
        )
    elif not (model.inputs and model.outputs):
        inputs, outputs = find(matcher_of(model, model.inputs), model.inputs, model.outputs)
        names = [(t, written_out(t.op)) for t in outputs]
        outputs = tuple(t if n is None else t.graph.get_operation_by_name(n).outputs[0] for t, n in names)
        model = replace(model, inputs=inputs, outputs=outputs)
    for tensor in model.inputs:
        if tensor.shape.rank is None:
            fix = "Give its placeholder a shape, with None for sizes that vary"
            raise ModelError(f"input {tensor.name!r}", "a tensor of known rank", "unknown rank", fix)
    return model


def legible(value: Any) -> GraphModel:
    """The model as it can be read: where ops have to be written out for that, in a copy of its graph."""
    model = as_model(value)
    if marks.are_in(model.graph) or not can(model.graph):
        return complete(model)
    graph = copied(model.graph)
    ends = {
        role: tuple(graph.get_tensor_by_name(t.name) for t in getattr(model, role)) for role in ("inputs", "outputs")
    }
    model = replace(model, graph=graph, **ends)
    write_out(graph, matcher_of(model, model.inputs).depends)
    return complete(model)


def to_write_out(model: GraphModel) -> set[str]:
    """Names of the ops of a graph that have to be written out for what is read of it."""
    reader = Reader(legible(model))
    reader.read()
    ops = [op for found in reader.found.values() for op in parts(found, reader.matcher.depends)]
    return {name for name in map(written_out, ops) if name is not None}


class Reader:
    """Walks back from the outputs and collects the ops."""

    def __init__(self, model: GraphModel):
        self.model = model
        self.behind = marks.standing_for(model.graph)
        self.finished = _finished(model.graph, self.behind)
        self.inputs = {t.name for t in model.inputs}
        self.needed = needed_by([self._final(t) for t in model.outputs], self.inputs)
        self.matcher = matcher_of(model, model.inputs, lambda op: op.name in self.needed)
        self.ops: list[Op] = []
        self.found: dict[str, Found] = {}
        self.tensors: dict[str, Tensor] = {}
        self.ranges: dict[str, RangeState] = {}
        self.helpers: dict[str, tuple[Any, str]] = {}  # of opaque tensors without numbers, the op they are for, and why

    def _final(self, tensor: Any) -> Any:
        """An output as its readers see it: behind its fake quantizations."""
        while tensor.name in self.finished:
            tensor = self.finished[tensor.name]
        return tensor

    def _id(self, tensor: Any) -> str:
        """What a tensor is called; one that stands for another is called like it."""
        name = tensor.name
        while name in self.behind:
            name = self.behind[name]
        return str(name).removesuffix(":0")

    def read(self) -> Graph:
        """The neutral graph."""
        model = self.model
        for tensor in model.inputs:
            self._tensor(tensor)
        outputs = [self._final(t) for t in model.outputs]
        for tensor in outputs:
            if self.matcher.is_parameter(tensor):
                raise ModelError(
                    f"tensor {tensor.name!r}",
                    "it must depend on the inputs",
                    "a tensor of weights only",
                    "Name outputs= that are computed from the inputs",
                )
            self._walk(tensor)
        self._numbers_are_float()
        names = tuple(map(tensor_id, model.outputs))
        return Graph(
            tuple(self.ops),
            self.tensors,
            tuple(map(tensor_id, model.inputs)),
            tuple(map(self._id, outputs)),
            NAME,
            tuple(map(tensor_id, model.inputs)),
            names if len(set(names)) == len(names) else tuple(f"output_{i}" for i in range(len(names))),
        )

    # -- the walk -------------------------------------------------------------------------------------------------

    def _walk(self, tensor: Any) -> None:
        """Collect what makes a tensor, inputs first; not recursive, because graphs are deep."""
        stack = [(tensor, False)]
        while stack:
            current, ready = stack.pop()
            if self._id(current) in self.tensors and not ready:
                continue
            if ready:
                if self._id(current) not in self.tensors:
                    self._add(self.found[current.name])
                continue
            found = self.found[current.name] = self._for_its_reader(self._match(current))
            stack.append((current, True))
            stack += [(t, False) for t in reversed(found.sources) if isinstance(t, tf.Tensor)]

    def _match(self, tensor: Any) -> Found:
        if tensor.op.type in SOURCES:
            fix = f"Add {tensor.name!r} to inputs=, or choose outputs= that do not need it"
            raise ModelError("inputs", "all data that the outputs depend on", f"no {tensor.name!r}", fix)
        found = self.matcher.match(tensor)
        if found.attrs.get("flag"):
            raise decides_on_more(f"{tensor.name!r}, on which a flag decides")
        return found

    def _for_its_reader(self, found: Found) -> Found:
        """What makes no numbers for an op that is not read, such as sizes or a loop's lists, is named like that op."""
        if found.kind != "opaque":
            return found
        if found.output.name in self.helpers:
            anchor, reason = self.helpers[found.output.name]
            found = replace(found, anchor=anchor, attrs={**found.attrs, "reason": reason})
        for source in found.sources:
            if not source.dtype.is_floating:
                self.helpers.setdefault(source.name, (found.anchor, found.attrs["reason"]))
        return found

    def _tensor(self, tensor: Any) -> str:
        name = self._id(tensor)
        if tensor.shape.rank is None:
            fix = "Give it a shape with set_shape()"
            raise ModelError(f"tensor {tensor.name!r}", "a tensor of known rank", "unknown rank", fix)
        dtype = tensor.dtype.base_dtype
        if dtype.is_floating and dtype != tf.float32:
            fix = "Build the model in float32, which is what is quantized"
            raise ModelError(f"tensor {tensor.name!r}", "a float32 tensor", dtype.name, fix)
        self.tensors[name] = Tensor(name, tuple(tensor.shape.as_list()), dtype.name)
        return name

    def _source(self, source: Any, near: str, index: int) -> str:
        if isinstance(source, tf.Tensor):
            return self._id(source)
        name = f"{near}/constant" if not index else f"{near}/constant_{index}"
        self.tensors[name] = Tensor(name, tuple(source.shape), str(source.dtype), source)
        return name

    def _add(self, found: Found) -> None:
        name = self._tensor(found.output)
        attrs, weights = dict(found.attrs), dict(found.weights)
        call = found.call or caller(self.matcher.evaluator, found)
        if found.kind == "fake_quant":
            attrs = self._range_attrs(attrs["mark"])
            call = attrs["quantizer"].call
        elif "codes" in attrs:
            attrs["is_waiting"] = partial(is_waiting, self.model.values, marks.of(found.kernel.tensor.op))
        attrs.pop("parameters", None)
        if attrs.pop("factors", ()):
            attrs["normalizes"] = True
        norm = batch_norm_of(self.matcher, found)
        if norm is not None:
            attrs["batch_norm"] = norm
        named = self._named(found.anchor)
        attrs["aliases"] = (named.name, found.anchor.name, *found.aliases)
        self.ops.append(
            Op(
                name,
                found.kind,
                tuple(self._source(s, name, i) for i, s in enumerate(found.sources)),
                (name,),
                attrs,
                weights,
                named.name,
                named.type,
                call,
                found,
            )
        )

    def _named(self, op: Any) -> Any:
        """The op by whose name and type a config selects: the one that it is a part of."""
        mark = marks.of(op, marks.PART)
        return op if mark is None else self.model.graph.get_operation_by_name(mark["of"])

    def _range_attrs(self, mark: dict[str, Any]) -> dict[str, Any]:
        spec = mark["spec"]
        if spec not in self.ranges:
            self.ranges[spec] = RangeState(mark, self.matcher.evaluator)
        state = self.ranges[spec]
        return {
            "spec": spec,
            "site": mark["site"],
            "quantizer": state,
            "unit": mark["fixed"] == [0.0, 1.0],
            "boundary": mark["boundary"],
            "is_waiting": state.is_waiting,
        }

    def _numbers_are_float(self) -> None:
        """An integer input that no embedding looks up holds numbers (pixels), which the artifact takes as reals."""
        ids = {t for op in self.ops if op.kind == "embedding" for t in op.inputs}
        for op in reversed(self.ops):
            if op.kind == "identity" and op.outputs[0] in ids:
                ids.update(op.inputs)
        for name, tensor in list(self.tensors.items()):
            if tensor.constant is None and tensor.dtype != "float32":
                self.tensors[name] = replace(tensor, dtype="int32" if name in ids else "float32")


def _finished(graph: Any, behind: dict[str, str]) -> dict[str, Any]:
    """For a tensor, the one that all its readers see in its place: its fake quantization, if an integer op made it."""
    found = {name: graph.get_tensor_by_name(stands) for stands, name in behind.items()}
    for op in graph.get_operations():
        mark = marks.of(op, marks.FAKE_QUANT) if op.type == "Identity" else None
        if mark is not None and mark["replaces"]:
            found[mark["input"]] = op.outputs[0]
    return found


def needed_by(outputs: list[Any], inputs: set[str]) -> set[str]:
    """Names of the graph ops that the outputs depend on, up to the inputs."""
    todo, seen = [t.op for t in outputs], set()
    while todo:
        op = todo.pop()
        if op.name not in seen:
            seen.add(op.name)
            todo += [t.op for t in op.inputs if t.name not in inputs]
    return seen


def read(value: Any) -> Graph:
    """Read a graph.

    Args:
        value: a `tf.Graph`, a session on one, or a `GraphModel`.

    Returns:
        The neutral graph. The values of variables are those at the time when they are first asked for.

    Raises:
        ModelError: a graph in which no model can be found, or a tensor of unknown rank.
    """
    return read_with_source(legible(value))[0]


def read_with_source(model: GraphModel) -> tuple[Graph, Reader]:
    """The neutral graph and the reader that knows the graph's own tensors."""
    reader = Reader(model)
    return reader.read(), reader
