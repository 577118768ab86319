"""Read a PyTorch model, float or wrapped, into the neutral graph.

Layout: torch's own. Batch on axis 0; channels on axis 1 of what convolutions read and write (NCW, NCHW, NCDHW);
features on the last axis of what a `dense` reads and writes. `Tensor.shape` has None wherever a size follows the size
of the batch (found by running two batch sizes), and the sizes of `example_inputs` elsewhere. Axes in attrs are
non-negative. `Tensor.dtype` is a numpy name; ids are `int64`. `call` takes and gives numpy arrays in this layout.

Every op has `attrs["aliases"]` (the names that `op_names` may match). An op with a kernel also has `channel_axis`, the
axis of its output along which the output channels lie; a `channel_affine` folds into it only if its `axis` is that one.
Windows are tuples with one int for each of the `rank` spatial axes, with torch's names and meanings.

Ops with a kernel (`weights` by role):
    conv2d: `rank` 1, 2 or 3, `stride`, `padding` (the same on both sides, zeros), `dilation`, `groups` (depthwise too).
        `kernel` (out, in / groups, *window), `kernel_axes` all but 0; `bias` (out,) or absent.
    conv2d_transpose: `rank`, `stride`, `padding`, `output_padding`, `dilation`, `groups`. `kernel` (in, out, *window),
        `kernel_axes` all but 1; with groups > 1 reshaped to (groups, in / groups, out / groups, *window), `kernel_axes`
        all but 0 and 2, so that the output channels are in the output's order; `bias`.
    dense: contracts the last axis of an input of any rank. `kernel` (out, in), `kernel_axes` (1,); `bias`.
    embedding: an input of ids. `kernel` (count, size), with one scale.
    channel_affine: `axis`; `scale` and `offset` (channels,): a batch norm with its running statistics, or a product or
        sum with a vector along `axis`.
    prelu: `kernel` shaped to broadcast against the input from the right, (channels, 1, 1) or (1,), with one scale.
    recurrent: `mode` "LSTM" or "GRU"; quantized weights, float arithmetic.

Arithmetic and functions:
    add, sub, mul, maximum, minimum: two inputs that broadcast; one may be a constant tensor.
    batch_matmul: two inputs, (..., n, k) and (..., k, m).
    mean, sum, reduce_max, reduce_min: `dim` (a tuple), `keepdim`. A pool over everything is a `mean` or `reduce_max`.
    elementwise: `fn`, a name such as `gelu`, `gelu_tanh`, `silu`, `hardswish`, `elu`, `leaky_relu`, `rsqrt`; `call`
        evaluates it on any shape.
    relu: `fn` = "relu", `max`: 6.0 for ReLU6, another limit, or None.
    sigmoid, tanh: nothing. softmax: `dim`, `beta` (the factor of its input), and perhaps
        `mask` (a bool array, True where a value counts; the others give 0).

Windows and shapes:
    max_pool2d: `rank`, `kernel_size`, `stride`, `padding`, `dilation`, `ceil_mode`.
    avg_pool2d: `rank`, `kernel_size`, `stride`, `padding` (which counts); windows of one size, divided by it.
    concat: `dim`. reshape: `shape`, the output's, None where it follows the batch.
    transpose: `dims`; output axis i is input axis dims[i].
    strided_slice: `begin`, `end` (None: to the end), `strides`, one per input axis; `shrink`: axes dropped afterwards.
    gather: `dim`, `indices` (int64 array, constant). tile: `repeats`, one per axis (an `expand` too).
    pad: `paddings`, (before, after) per axis, `value`. mirror_pad: `paddings`, `mode` "reflect".
    resize_nearest, resize_bilinear: `size` (of the output's spatial axes), `scale_factor` (floats, or None if the size
        was given), `align_corners`.
    identity: nothing in the artifact (dropout, contiguous, hooks).
    opaque: `reason`; `where` (file and line) for a functional op of a model that cannot be traced.

In a wrapped model there are also, as in the Keras 3 front end, ops of kind `fake_quant` with attrs `spec` (one per
range), `site` (index of the observer, or None), `quantizer` (`bits`, `symmetric`, `nonneg`, `fixed`, `range()`,
`is_set()`, `set_range(low, high, site, covered, held)`), `unit`, `boundary` and `is_waiting`; and ops with a kernel
have `formula` (of `kquant.core.weights`), `codes` (gives integer-valued float codes in the shape of `kernel`, and a
scale that broadcasts) and `is_waiting`. `call(inputs, float_weights=True)` runs them on the float kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from kquant.core.errors import ModelError, UnsupportedError
from kquant.core.graph import Graph
from kquant.core.stages import stages
from kquant_torch.faithful import FLOAT, check_faithful
from kquant_torch.reader import Name, Reader
from kquant_torch.trace import Inputs, propagate, trace
from kquant_torch.tracer import NotTraceable


@dataclass
class Reading:
    """A model that was read: its graph, and the fx graph that `attach` rewrites."""

    graph: Graph
    model: nn.Module
    code: fx.Graph
    inputs: Inputs
    names: list[Name] = field(default_factory=list)
    items: dict[str, fx.Node] = field(default_factory=dict)
    constants: dict[str, fx.Node] = field(default_factory=dict)
    traced: bool = True


def read_code(model: nn.Module, example_inputs: Any = None) -> Reading:
    """Trace and read a model; what `read` returns, with the fx graph."""
    from kquant_torch.expand import expand
    from kquant_torch.root import example_of, is_quantized, names_of, target_of

    if not isinstance(model, nn.Module):
        raise ModelError("model", "a torch.nn.Module", type(model).__name__, "Hand in the module itself")
    inputs = Inputs(model, example_of(model) if example_inputs is None else example_inputs)
    code, training_only = trace(model, inputs)
    names = names_of(model)
    expand(model, code, inputs)
    propagate(model, code, inputs.values)
    reader = Reader(model, code, training_only, names)
    outputs = reader.walk()
    if not reader.ops:
        raise ModelError(
            f"model {type(model).__name__}", "a model with at least one layer", "an empty model", "Add layers to it"
        )
    tensors = tuple(reader.values[n] for n in code.nodes if n.op == "placeholder")
    output_names = ("output",) if len(outputs) == 1 else tuple(f"output_{i}" for i in range(len(outputs)))
    name = type(model).__name__.removeprefix("Quantized")
    ends = tensors, tuple(outputs)
    graph = Graph(tuple(reader.ops), reader.tensors, *ends, name, tensors, output_names, target_of(model))
    if not is_quantized(model):
        check_faithful(model, graph, inputs.values, FLOAT)
    return Reading(_with_shared_kernels(graph), model, code, inputs, reader.names, reader.items, reader.constants)


def _with_shared_kernels(graph: Graph) -> Graph:
    """Mark the layers that are called before different norms: their one quantizer cannot hold the gains of several."""
    norms: dict[str, set[str]] = {}
    for stage in stages(graph):
        if stage.anchor.source.op == "call_module":
            norm = "" if stage.norm is None else str(stage.norm.source.target)
            norms.setdefault(str(stage.anchor.source.target), set()).add(norm)
    several = {layer for layer, found in norms.items() if len(found) > 1}
    ops = [
        replace(op, attrs={**op.attrs, "may_hold_norm": False}) if str(op.source.target) in several else op
        for op in graph.ops
    ]
    return replace(graph, ops=tuple(ops))


def read(model: nn.Module, example_inputs: Any = None) -> Graph:
    """Read a model.

    Args:
        model: a float module, or one that `kquant_torch.wrap` or a quantizer returned.
        example_inputs: a tensor, a tuple of tensors or a dict by argument name, one batch. A wrapped model knows
            the shapes of its own.

    Returns:
        The graph; weights are read when asked for, so it follows the model's training.

    Raises:
        ModelError: not a module, empty, or example inputs that it cannot be called on.
        UnsupportedError: control flow that depends on values or on the mode; a model that computes something else than
            what was read.
    """
    try:
        return read_code(model, example_inputs).graph
    except NotTraceable as error:
        raise UnsupportedError(
            f"model {type(model).__name__!r}",
            "a forward that torch.fx can trace, since an artifact has no control flow",
            str(error),
            "Move the control flow out of the model; it can be wrapped and trained as it is, but not exported",
        ) from error
