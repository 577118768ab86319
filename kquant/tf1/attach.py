"""Rewrite a graph in place so that it trains, or evaluates, what a plan describes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from kquant.core.constants import ARITHMETIC, held_constant
from kquant.core.errors import ModelError
from kquant.core.moving import EMA_DECAY
from kquant.core.plan import Plan, Site, Spec, WeightSpec
from kquant.core.reports import Report
from kquant.core.weights import gain_shape, weight_formula
from kquant.tf1 import marks
from kquant.tf1.graphs import GraphModel, as_model, remember, tensor_id
from kquant.tf1.match import Found
from kquant.tf1.norms import gain_of, make_freezable
from kquant.tf1.phase import trains
from kquant.tf1.ranges import Range
from kquant.tf1.read import complete, needed_by, read_with_source, to_write_out
from kquant.tf1.rewire import Slot, readers, redirect, slots
from kquant.tf1.state import SCOPE, State, scope_of
from kquant.tf1.write_out import can, write_out
from kquant.tf_numerics import quantized_weight, weight_codes, with_quantized_gradient


@dataclass(frozen=True)
class RewriteReport(Report):
    """What a quantizer did to a graph.

    Args:
        training: whether observers update when the graph runs.
        inputs, outputs: names of the tensors between which it was quantized.
        activations: number of fake quantizations of activations.
        kernels: number of fake-quantized kernels.
        ops_added, variables_added: how many graph ops and variables there are more than before.
    """

    title: ClassVar[str] = "Quantized graph"

    training: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    activations: int
    kernels: int
    ops_added: int
    variables_added: int

    def facts(self) -> list[tuple[str, Any]]:
        """All of it."""
        return [
            ("form", "training" if self.training else "evaluation"),
            ("inputs", self.inputs),
            ("outputs", self.outputs),
            ("activations quantized", self.activations),
            ("kernels quantized", self.kernels),
            ("ops added", self.ops_added),
            ("variables added", self.variables_added),
        ]


class Rewriter:
    """Applies a plan to a graph. Use `attach`."""

    def __init__(self, plan: Plan, model: GraphModel):
        self.plan, self.model, self.graph = plan, model, model.graph
        self.read, source = read_with_source(model)
        self.matcher, self.needed = source.matcher, source.needed
        self.state = State(self.graph)
        self.ranges: dict[str, Range] = {}
        # What the integer readers of a tensor see.
        stands = {name: self.graph.get_tensor_by_name(by) for by, name in marks.standing_for(self.graph).items()}
        self.current: dict[str, Any] = {tensor_id(self._raw(name)): tensor for name, tensor in stands.items()}
        self.found: dict[str, Found] = {}
        self.trains: Any = None
        self.activations = self.kernels = 0

    def check_trains(self) -> None:
        """Refuse to make a training graph of one in which nothing is trained.

        Raises:
            ModelError: the outputs depend on no trainable variable.
        """
        trained = {v.op.name for v in self.graph.get_collection(tf.compat.v1.GraphKeys.TRAINABLE_VARIABLES)}
        if not trained & self.needed:
            fix = "Pass training=False: then it can be calibrated and exported"
            raise ModelError("graph", "a graph with at least one trainable weight", "none", fix)

    def run(self) -> None:
        """Insert everything."""
        found = self.found = {op.id: op.source for op in self.read.ops}
        if self.model.training:
            needed = [needed_by([t], {i.name for i in self.model.inputs}) for t in self.model.outputs]
            with tf.name_scope(f"{SCOPE}/phase/"):
                self.trains = trains(self.matcher, found.values(), needed)
        # All places are looked up before the first of them changes.
        places = {op_id: slots(f, self.matcher.depends) for op_id, f in found.items()}
        for name in self.read.inputs:
            self._sites(name, by_integer=False, places=places)
        for op in self.read.ops:
            self._op(op, found[op.id], places)

    def _op(self, op: Any, found: Found, places: dict[str, list[list[Slot]]]) -> None:
        for index in range(len(op.inputs)):
            edge = self.plan.edges.get((op.id, index))
            if edge is not None:
                self._edge(op, index, edge, places[op.id][index])
        self._hold(op, found)
        if op.id in self.plan.weights:
            self._kernel(op, found, self.plan.weights[op.id])
        if self.model.training and op.kind == "channel_affine":
            normalized = make_freezable(self.matcher, found, self.state)
            if normalized is not None and found.output is found.anchor.outputs[0]:
                self.current[op.id] = normalized
        for tensor in op.outputs:
            # A trained array has other readers than the model, such as what initializes and saves it.
            self._sites(tensor, op.id in self.plan.integer and op.kind != "parameter", places)

    def _hold(self, op: Any, found: Found) -> None:
        """Put the constant of an integer sum or product on the grid that the artifact has."""
        wide = any(self.plan.specs[site.spec].bits == 16 for site in self.plan.sites.get(op.output, ()))
        index = next((i for i, s in enumerate(found.sources) if not isinstance(s, tf.Tensor)), None)
        if index is None or op.kind not in ARITHMETIC or op.id not in self.plan.integer or wide:
            return
        value = found.sources[index]
        held = held_constant(value, op.id)
        if held is value:
            return
        graph_op = found.anchor
        given = graph_op.inputs[index]
        with np.errstate(divide="ignore"):  # a reciprocal too small for the grid is 0, and its divisor infinite
            operand = np.float32(1.0) / held if graph_op.type == "RealDiv" else held
        with tf.name_scope(f"{scope_of(graph_op.name)}/"):
            constant = tf.constant(operand.reshape(given.shape.as_list()), tf.float32, name="constant")
        redirect([(graph_op, index)], constant)

    # -- activations ----------------------------------------------------------------------------------------------

    def _sites(self, name: str, by_integer: bool, places: dict[str, list[list[Slot]]]) -> None:
        """The fake quantizations of a tensor: all its readers see those of an integer op, else the integer ones do."""
        for site in self.plan.sites.get(name, ()):
            source = self.current.get(name, self._raw(name))
            if by_integer:
                # A probability below half a step is 0, of which a loss has no logarithm.
                lost = [op for op in source.consumers() if op.type == "Log" and op.name not in self.needed]
                where = [place for place in readers(source) if place[0] not in lost]
            else:
                integer = [op for op in self.read.ops if op.id in self.plan.integer]
                where = [p for op in integer for t, ps in zip(op.inputs, places[op.id], strict=True) if t == name
                         for p in ps]  # fmt: skip
            self.current[name] = self._fake_quantize(source, name, site, where, by_integer)

    def _edge(self, op: Any, index: int, site: Site, where: list[Slot]) -> None:
        source = self.current.get(op.inputs[index], self._raw(op.inputs[index]))
        self._fake_quantize(source, f"{op.id}/operand{index}", site, where, False)

    def _raw(self, name: str) -> Any:
        return self.graph.get_tensor_by_name(name if ":" in name else f"{name}:0")

    def _fake_quantize(self, source: Any, name: str, site: Site, where: list[Slot], replaces: bool) -> Any:
        spec = self.plan.specs[site.spec]
        if spec.id not in self.ranges:
            self.ranges[spec.id] = self._range(spec)
        with tf.name_scope(f"{scope_of(name)}/"):
            result = self.ranges[spec.id].apply(source, site, replaces)
        redirect(where, result)
        self.activations += 1
        return result

    def _range(self, spec: Spec) -> Range:
        decay = 1.0 if spec.naive else EMA_DECAY
        # Training may read from an iterator what evaluation is fed; a checkpoint knows neither's name.
        is_the_input = [spec.id] == list(self.read.inputs)
        base = scope_of("model_input" if is_the_input else spec.id)
        return Range(spec, base, self.state, decay, self.model.training, self.trains)

    # -- kernels --------------------------------------------------------------------------------------------------

    def _kernel(self, op: Any, found: Found, spec: WeightSpec) -> None:
        kernel = found.kernel
        if kernel is None:
            raise ModelError(
                f"op {op.id!r}",
                "an op with a kernel",
                op.kind,
                "Report this graph: an op without a kernel was planned to have one",
            )
        axes = kernel.axes if spec.per_channel else None
        formula = weight_formula(spec.quantizer, spec.bits, axes)
        scope = f"{scope_of(kernel.op.name)}/kernel/"
        with tf.name_scope(scope):
            gain = self._gain(kernel, spec.folds_norm, scope) if spec.folds_norm else None
            codes, scale = weight_codes(formula, kernel.tensor, gain)
            value = quantized_weight(formula, kernel.tensor, gain)
            if gain is not None and self.model.training:
                deployed, value = value, tf.identity(quantized_weight(formula, kernel.tensor, gain, True), "floored")
                marks.put(value.op, marks.FLOORED, input=deployed.name)
            started = self.state.started(spec.start_step)
            result = tf.identity(value if started is None else tf.where(started, value, kernel.tensor), "quantized")
        marks.put(
            result.op, marks.WEIGHT, kernel=kernel.tensor.name, codes=codes.name, scale=scale.name, axes=axes,
            quantizer=spec.quantizer, bits=spec.bits, start_step=spec.start_step,
            step=self.state.step_name(spec.start_step), folds_norm=gain is not None,
        )  # fmt: skip
        if kernel.op.type == "ResourceGather":
            self._look_up(op.id, kernel.op, result)
        else:
            redirect([(kernel.op, kernel.slot)], result)
        self.kernels += 1
        if spec.gradient_bits and self.model.training:
            self._gradient(kernel.op, spec, started)

    def _gain(self, kernel: Any, norm: str, scope: str) -> Any:
        """The gain of the norm behind an op, as it broadcasts against the op's kernel."""
        gain = gain_of(self.matcher, self.found[norm], scope.removesuffix("/"))
        return tf.reshape(gain, gain_shape(int(gain.shape[0]), kernel.tensor.shape.as_list(), kernel.axes))

    def _look_up(self, name: str, op: Any, table: Any) -> None:
        """A look-up in a variable reads past whatever is in the graph, so one in the quantized table replaces it."""
        where = readers(op.outputs[0])
        with tf.name_scope(f"{scope_of(op.name)}/kernel/"):
            result = tf.identity(tf.gather(table, op.inputs[1]), "looked_up")
        marks.put(result.op, marks.LOOK_UP, input=op.outputs[0].name)
        redirect(where, result)
        self.current[name] = result

    def _gradient(self, op: Any, spec: WeightSpec, started: Any) -> None:
        """Quantize the gradient with respect to what a kernel's op makes, before its bias."""
        output = op.outputs[0]
        scope = f"{scope_of(op.name)}/gradient"
        draws = self.state.variable(f"{scope}/draws", np.int32(0))
        where = readers(output)
        with tf.name_scope(f"{scope}/"):
            draw = draws.assign_add(1, read_value=True)
            result = tf.identity(with_quantized_gradient(output, spec.gradient_bits, (op.name, draw), started))
        marks.put(result.op, marks.GRADIENT, input=output.name)
        redirect(where, result)
        if tensor_id(output) in self.read.tensors:
            self.current[tensor_id(output)] = result


def attach(plan: Plan, value: Any) -> GraphModel:
    """Rewrite a graph in place.

    Args:
        plan: for the graph as it was read.
        value: the graph, a session on it, or a `GraphModel`.

    Returns:
        The rewritten graph with its inputs and outputs.

    Raises:
        ModelError: a graph to be trained in which no quantized kernel is.
    """
    model = as_model(value)
    graph = model.graph
    before = len(graph.get_operations())
    if can(graph):
        write_out(graph, set(), to_write_out(model))
    model = complete(model)
    with graph.as_default(), tf.control_dependencies(None):
        rewriter = Rewriter(plan, model)
        if model.training:
            rewriter.check_trains()
        rewriter.run()
        remember(model)
    model.values.set(rewriter.state.first, changed=False)
    report = RewriteReport(
        model.training, tuple(map(tensor_id, model.inputs)), tuple(map(tensor_id, model.outputs)),
        rewriter.activations, rewriter.kernels, len(graph.get_operations()) - before, len(rewriter.state.first),
    )  # fmt: skip
    return replace(model, report=report)
