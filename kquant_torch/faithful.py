"""Whether what was read computes what the model computes: both run on the same values, before anything is made of it.

A reading is right in everything that its ops' `call`s compute. What it leaves out (a hook that changes values, a
dropout that goes on in evaluation) or gets wrong shows here, and is refused instead of being trained and shipped.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from kquant.core.errors import ModelError, UnsupportedError
from kquant.core.graph import Graph, Op, walk
from kquant_torch.trace import Inputs, tensors_of
from kquant_torch.tracer import in_mode

# Of the norm of an output. Composites are computed in another order than torch's fused kernels (1e-5 in nets of tens of
# layers); a quantized model may round a value at a boundary the other way, and that travels on.
FLOAT, QUANTIZED = 1e-3, 2e-2
OTHERS = 0.8  # what other inputs are of the example inputs: no multiple of a grid's step
FIX = (
    "A hook that changes values, a dropout that is active in evaluation, and code that computes something else at each"
    " call are not read; do it in forward, and in training only"
)


def check_faithful(model: nn.Module, graph: Graph, values: Mapping[str, torch.Tensor], tolerance: float) -> None:
    """Compare a model with the graph that was read from it, in evaluation mode.

    Args:
        model: the module that was read.
        graph: what was read.
        values: inputs by name, of the sizes that it was read with.
        tolerance: the largest difference, as a share of the norm of an output.

    Raises:
        ModelError: the model cannot be called on these values.
        UnsupportedError: an output differs; with the first layer that does.
    """
    names = {str(op.source.target) for op in graph.ops if op.source.op == "call_module"}
    given = _turned(values)  # other values than it was traced on, where it takes them
    try:
        expected = _run(model, given, names)
    except Exception:  # whatever a user's code raises
        given = values
        expected = _run_examples(model, values, names)
    if not all(map(torch.equal, expected[0], _run(model, given, set())[0])):
        return  # it computes something else each time; there is nothing to compare with
    if any(_is_other_size(graph.tensors[t].shape, v) for t, v in zip(graph.inputs, given.values(), strict=True)):
        return  # a fully convolutional model takes these sizes; its ops here were read on others
    found = _read(graph, given)
    if len(found["outputs"]) != len(expected[0]):
        raise _refusal(graph, f"{len(expected[0])} tensors", f"{len(found['outputs'])} were read")
    for i, (ours, theirs) in enumerate(zip(found["outputs"], expected[0], strict=True)):
        share = _difference(ours, theirs)
        if share > tolerance:
            where = next((n for n, v in expected[1].items() if _differs(found["layers"].get(n), v, tolerance)), None)
            first = "behind the last layer" if where is None else f"first at the output of {where!r}"
            raise _refusal(
                graph, "what was read computes what the model computes", f"output {i} differs by {share:.1%}, {first}"
            )


def check_export(qmodel: nn.Module, graph: Graph, example_inputs: Any) -> None:
    """Compare a wrapped model with the graph that is exported, on the example inputs and, if they differ, on others.

    At few bits one value that is rounded the other way can move an output far. It lies at a boundary on one batch only;
    what was not read is missing on every batch.

    Raises:
        ModelError, UnsupportedError: as `check_faithful`.
    """
    values = Inputs(qmodel, example_inputs).values
    try:
        check_faithful(qmodel, graph, values, QUANTIZED)
    except UnsupportedError:
        others = {name: OTHERS * v if v.is_floating_point() else v for name, v in values.items()}
        check_faithful(qmodel, graph, others, QUANTIZED)


def _refusal(graph: Graph, expected: str, received: str) -> UnsupportedError:
    return UnsupportedError(f"model {graph.name!r}", expected, received, FIX)


def _is_other_size(shape: tuple[int | None, ...], value: torch.Tensor) -> bool:
    return any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True))


def _turned(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers in other places."""
    return {name: value.flip(-1) if value.ndim > 1 else value for name, value in values.items()}


def _run(
    model: nn.Module, values: Mapping[str, torch.Tensor], names: set[str]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The outputs of the model, and of its layers at their first call."""
    layers: dict[str, torch.Tensor] = {}
    with _seeded(), in_mode(model, False), torch.no_grad(), _watched(model, names, layers):
        result = _called(model, {name: value.clone() for name, value in values.items()})
    return [t.detach().cpu() for t in tensors_of(result)], layers


def _called(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Any:
    """By position, which hooks of a user's own count on; by name from an argument on that is left out."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    leading = itertools.takewhile(lambda p: p.name in values and p.kind is not p.KEYWORD_ONLY, parameters)
    first = [p.name for p in leading]
    return model(*(values[name] for name in first), **{name: v for name, v in values.items() if name not in first})


def _run_examples(model: nn.Module, values: Mapping[str, torch.Tensor], names: set[str]) -> Any:
    try:
        return _run(model, values, names)
    except Exception as error:
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            "example_inputs",
            "inputs that the model can be called on",
            f"{shapes}; the model raised {type(error).__name__}: {first}",
            "Pass a batch that the float model accepts",
        ) from error


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers for both, and those of the user's own as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def _watched(model: nn.Module, names: set[str], layers: dict[str, torch.Tensor]) -> Iterator[None]:
    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name not in layers and isinstance(output, torch.Tensor):
                layers[name] = output.detach().cpu().clone()

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(graph: Graph, values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The outputs of the graph, and of those of its ops that are layers, at their first call."""
    layers: dict[str, torch.Tensor] = {}
    feeds = {t: v.detach().cpu().numpy() for t, v in zip(graph.inputs, values.values(), strict=True)}
    kept: dict[str, np.ndarray] = dict(feeds)
    wanted = set(graph.outputs)

    def visit(op: Op, inputs: list[Any], outputs: list[Any]) -> None:
        kept.update({t: v for t, v in zip(op.outputs, outputs, strict=True) if t in wanted})
        if op.source.op == "call_module" and len(outputs) == 1:
            layers.setdefault(str(op.source.target), torch.from_numpy(np.array(outputs[0])))

    with _seeded():
        walk(graph, feeds, visit)
    return {"outputs": [torch.from_numpy(np.array(kept[t])) for t in graph.outputs], "layers": layers}


def _differs(ours: torch.Tensor | None, theirs: torch.Tensor, tolerance: float) -> bool:
    return ours is not None and _difference(ours, theirs) > tolerance


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of the difference as a share of the norm; infinite for other shapes, and 0 where nothing is finite."""
    if ours.shape != theirs.shape:
        return float("inf")
    a, b = ours.double(), theirs.double()
    finite = torch.isfinite(a) & torch.isfinite(b)
    a, b = a[finite], b[finite]
    return float((a - b).norm() / b.norm().clamp_min(1e-30)) if len(b) else 0.0
