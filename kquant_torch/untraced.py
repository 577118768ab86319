"""Models that fx cannot trace: recorded on the example inputs, and wrapped module by module.

The layers that are modules are quantized where they are called, by hooks; what the model's own code does between them
stays float, and the plan names each such call with its file and line.
"""

from __future__ import annotations

import itertools
import operator
import pathlib
import sys
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from kquant.core.calibration import Reach, Watch, batches, first_batches
from kquant.core.graph import Graph, Op
from kquant.core.plan import Plan, Site
from kquant_torch.attach import Builder
from kquant_torch.data import arrays_of
from kquant_torch.fake_quantize import FakeQuantize, fake_quantize_range
from kquant_torch.norms import BATCH_NORMS
from kquant_torch.read import Reading
from kquant_torch.reader import Reader
from kquant_torch.root import STATE
from kquant_torch.trace import Described, Inputs
from kquant_torch.tracer import Tracer, in_mode

_OWN = (str(pathlib.Path(torch.__file__).parent), str(pathlib.Path(__file__).parent))


class _Recorder(TorchFunctionMode):
    """Notes calls of layers and of functions between them as nodes of an fx graph."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Any] = []  # keeps tensors alive, so that no id is used twice
        self.inside = 0
        leaf = Tracer().is_leaf_module
        self.layers = [(n, m) for n, m in model.named_modules() if n and leaf(m, n)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            self.note(func, args, kwargs or {}, result, _where())
        return result

    def note(self, target: Any, args: Any, kwargs: Any, result: Any, where: str | None) -> None:
        """Note one call, unless it gives no float tensor or depends on no input."""
        used = [self.nodes[id(v)] for v in pytree.tree_leaves((args, kwargs)) if id(v) in self.nodes]
        given = [v for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor) and v.is_floating_point()]
        if not used or not given or all(id(v) in self.nodes for v in given):
            return
        create = self.graph.call_module if isinstance(target, str) else self.graph.call_function
        node = create(target, tuple(dict.fromkeys(used)))
        if where is not None:
            node.meta["where"] = where
        self._hold(node, result)

    def _hold(self, node: fx.Node, value: Any) -> None:
        node.meta["value"] = pytree.tree_map(lambda v: Described(v) if isinstance(v, torch.Tensor) else v, value)
        self.kept.append(value)
        if isinstance(value, torch.Tensor):
            self.nodes[id(value)] = node
        elif isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                self._hold(self.graph.call_function(operator.getitem, (node, i)), part)

    def run(self, model: nn.Module, inputs: Inputs) -> fx.Graph:
        """The graph of one call on the example inputs, in evaluation mode."""
        for name, value in inputs.values.items():
            self._hold(self.graph.placeholder(name), value)
        handles = []
        for name, module in self.layers:
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True))
        try:
            with in_mode(model, False), torch.no_grad(), self:
                result = model(**inputs.values)
        finally:
            for handle in handles:
                handle.remove()
        self.graph.output(pytree.tree_map(lambda v: self.nodes.get(id(v), v), result))
        return self.graph

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.inside += 1

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.inside -= 1
            if not self.inside:
                self.note(name, args, kwargs, output, None)

        return hook


def _where() -> str:
    """File and line of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return f"{pathlib.Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def read_untraced(model: nn.Module, inputs: Inputs) -> Reading:
    """The graph of the calls that a model makes on the example inputs."""
    code = _Recorder(model).run(model, inputs)
    reader = Reader(model, code, frozenset(), ())
    reader.is_complete = False
    outputs = reader.walk()
    tensors = tuple(reader.values[n] for n in code.nodes if n.op == "placeholder")
    names = tuple(f"output_{i}" for i in range(len(outputs)))
    graph = Graph(tuple(reader.ops), reader.tensors, tensors, tuple(outputs), type(model).__name__, tensors, names)
    return Reading(graph, model, code, inputs, reader.names, reader.items, traced=False)


# -- hooks ----------------------------------------------------------------------------------------------------------


class QuantizeInputs:
    """A forward pre-hook that fake-quantizes a layer's inputs; `children` names the quantizer of each argument."""

    def __init__(self) -> None:
        self.children: dict[int, tuple[str, int | None, bool]] = {}

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        """The arguments, quantized."""
        return tuple(_quantized(module, x, self.children.get(i)) for i, x in enumerate(args))


class QuantizeOutput:
    """A forward hook that fake-quantizes a layer's output."""

    def __init__(self, children: list[tuple[str, int | None, bool]]):
        self.children = children

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The output, quantized."""
        for child in self.children:
            output = _quantized(module, output, child)
        return output


def _quantized(module: nn.Module, x: Any, child: tuple[str, int | None, bool] | None) -> Any:
    if child is None:
        return x
    name, site, boundary = child
    return getattr(module, name)(x, site=site, boundary=boundary)


class _Hooked(Builder):
    """Attaches a plan by hooks, since the model's own code stays as it is."""

    def build(self) -> nn.Module:
        calls: dict[str, Op] = {}
        for op in self.graph.ops:
            node: fx.Node = op.source
            if node.op != "call_module" or str(node.target) in calls:
                continue  # a layer that is called again keeps the quantizers of its first call
            calls[str(node.target)] = op
            module = self.model.get_submodule(str(node.target))
            self._weight(op)
            if op.id in self.plan.integer:
                self._inputs(op, module)
                self._output(op, module)
            if type(module) in BATCH_NORMS:
                module.__class__, module.frozen = BATCH_NORMS[type(module)], False
            if getattr(module, "inplace", False) is True:
                module.inplace = False
        values = self.reading.inputs.values
        inputs = {name: (tuple(v.shape), v.dtype) for name, v in values.items()}
        self.model.__dict__[STATE] = {"untraced": True, "inputs": inputs, "tensors": self._signature()}
        return self.model

    def _signature(self) -> Graph:
        tensors = {t: self.graph.tensors[t] for t in self.graph.inputs}
        return Graph((), tensors, self.graph.inputs, (), self.graph.name, self.graph.input_names)

    def _inputs(self, op: Op, module: nn.Module) -> None:
        hook = QuantizeInputs()
        for index, tensor in enumerate(op.inputs):
            producer = self.graph.producers().get(tensor)
            sites = () if producer is not None and producer.id in self.plan.integer else self.plan.sites.get(tensor, ())
            edge = self.plan.edges.get((op.id, index))
            for site in (*sites, *(() if edge is None else (edge,))):
                hook.children[index] = self._child(module, f"input_quantizer_{index}", site)
        if hook.children:
            module.register_forward_pre_hook(hook)

    def _output(self, op: Op, module: nn.Module) -> None:
        sites = self.plan.sites.get(op.outputs[0], ())
        made = [self._child(module, f"output_quantizer_{i}", site) for i, site in enumerate(sites)]
        if made:
            module.register_forward_hook(QuantizeOutput(made))

    def _child(self, module: nn.Module, name: str, site: Site) -> tuple[str, int | None, bool]:
        if site.spec not in self.quantizers:
            self.quantizers[site.spec] = self._quantizer(site.spec)
        self.quantizers[site.spec].calls += 1
        module.add_module(name, self.quantizers[site.spec].train(module.training))
        return name, site.index, site.boundary


def attach_hooks(plan: Plan, reading: Reading) -> nn.Module:
    """The wrapped model, changed in place: its layers quantize, its code stays as it is."""
    return _Hooked(plan, reading).build()


def is_untraced(model: nn.Module) -> bool:
    """Whether a model was wrapped module by module."""
    return bool(model.__dict__.get(STATE, {}).get("untraced"))


def calibrate_untraced(qmodel: nn.Module, data: Any, observer: str) -> None:
    """Set the ranges of a model that was wrapped module by module, by running it as a whole."""
    signature: Graph = qmodel.__dict__[STATE]["tensors"]
    quantizers = list(dict.fromkeys(m for m in qmodel.modules() if isinstance(m, FakeQuantize)))
    ops = {
        (q, site): Op(
            f"{q.name}/{site}", "fake_quant", (q.name,), (f"{q.name}/{site}",),
            {"spec": q.name, "site": site, "quantizer": q, "unit": q.unit},
        )
        for q in quantizers
        for site in ([None] if q.fixed is not None else range(q.sites))
    }  # fmt: skip
    graph = signature.replace(ops=tuple(ops.values()))
    stream = batches(arrays_of(data), signature)
    head, watch = first_batches(stream), Watch(observer, {})

    def observe(q: FakeQuantize, x: torch.Tensor, site: int | None) -> torch.Tensor:
        if (q, site) in ops:
            watch(ops[q, site], [x.cpu().numpy()], [])
        return x

    _run_watched(qmodel, quantizers, itertools.chain(head, stream), observe)
    watch.set_ranges(graph)
    reach = Reach(watch)

    def quantize(q: FakeQuantize, x: torch.Tensor, site: int | None) -> torch.Tensor:
        if (q, site) in ops:
            reach(ops[q, site], [x.cpu().numpy()], [])
        return fake_quantize_range(x, *q.limits(), q.bits)

    if reach.cut:
        _run_watched(qmodel, quantizers, head, quantize)
        reach.set_shares(graph)


def _run_watched(qmodel: nn.Module, quantizers: list[FakeQuantize], stream: Any, seen: Any) -> None:
    """Run a model in evaluation on feeds, with `seen` in the place of every quantizer's own work."""
    device = next((p.device for p in qmodel.parameters()), None)
    for q in quantizers:
        q.watch = seen
    try:
        with in_mode(qmodel, False), torch.no_grad():
            for feeds in stream:
                qmodel(**{n: torch.as_tensor(v).to(device) for n, v in feeds.items()})
    finally:
        for q in quantizers:
            q.watch = None
