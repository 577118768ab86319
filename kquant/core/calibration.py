"""Calibration: set every observed range of a quantized model from data, before the first training step."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kquant.core.errors import CalibrationError
from kquant.core.graph import Graph, Op, walk
from kquant.core.input_range import input_ranges
from kquant.core.observers import Observer, make_observer

BATCH = 32  # samples of an array that are run at a time
HEAD = 128  # samples on which the ranges of the inputs are chosen


def batches(data: Any, graph: Graph) -> Iterator[dict[str, np.ndarray]]:
    """Feeds for a graph's inputs from what a user hands over.

    Args:
        data: an array of samples; for several inputs also a list of one array each, or a dict by input name; or a list
            or another iterable of batches, each an array, a list or tuple of inputs, a dict by input name, or
            `(x, y[, w])`, of which x is used. It is consumed once.
        graph: the graph to feed.

    Raises:
        CalibrationError: a batch of the wrong structure, shape or dtype, with NaN or infinity, or no batch at all.
    """
    size = _batch_size(graph)
    if hasattr(data, "shape"):
        array = _numbers(data, "calibration data", "the samples")
        data = [array[i : i + size] for i in range(0, len(array), size)] if array.ndim else [array]
    elif isinstance(data, Mapping) or _is_an_array_each(data, graph):
        whole = _feeds(data, graph, "calibration batch 0")
        named = dict(zip(graph.input_names, whole.values(), strict=True))
        count = len(next(iter(named.values())))
        data = [{k: v[i : i + size] for k, v in named.items()} for i in range(0, count, size)]
    if not isinstance(data, Iterable):
        raise CalibrationError(
            "calibration data",
            "an array of samples or an iterable of batches",
            type(data).__name__,
            "Pass an array, or a list of batches",
        )
    count = 0
    for index, batch in enumerate(data):
        yield _feeds(batch, graph, f"calibration batch {index}")
        count += 1
    if not count:
        raise CalibrationError(
            "calibration data", "at least one batch", "none", "An iterator that was already used up gives none"
        )


def _batch_size(graph: Graph) -> int:
    """How many samples of an array are run at a time: a multiple of the model's own batch, where that is fixed."""
    fixed = graph.tensors[graph.inputs[0]].shape[:1]
    own = fixed[0] if fixed and fixed[0] else 1
    return max(BATCH // own, 1) * own


def _is_an_array_each(data: Any, graph: Graph) -> bool:
    """Whether data for several inputs are one array of samples each, as `fit` takes them: no batch is a bare array."""
    several = isinstance(data, (list, tuple)) and len(data) == len(graph.inputs) > 1
    return several and all(hasattr(v, "shape") for v in data)


def _feeds(batch: Any, graph: Graph, where: str) -> dict[str, np.ndarray]:
    names = graph.inputs
    # Of two inputs a pair is either the inputs or (x, y); it is (x, y) where x is itself a collection.
    nested = isinstance(batch, tuple) and len(batch) > 0 and isinstance(batch[0], (Mapping, list, tuple))
    if isinstance(batch, (tuple, list)) and len(names) > 1 and len(batch) == len(names) and not nested:
        values = list(batch)
    else:
        x = batch[0] if isinstance(batch, tuple) and 1 <= len(batch) <= 3 else batch
        if isinstance(x, Mapping):
            missing = [n for n in graph.input_names if n not in x]
            if missing:
                raise CalibrationError(
                    where,
                    f"a value for every input {list(graph.input_names)}",
                    list(x),
                    "Give every input by that name",
                )
            values = [x[n] for n in graph.input_names]
        else:
            values = list(x) if isinstance(x, (list, tuple)) and len(x) == len(names) and len(names) > 1 else [x]
    if len(values) != len(names):
        fix = "A batch of several inputs is a list of one array each, or a dict by input name"
        raise CalibrationError(where, f"{len(names)} inputs", f"{len(values)}", fix)
    feeds = {n: _array(v, graph, n, where) for n, v in zip(names, values, strict=True)}
    counts = {n: len(v) for n, v in feeds.items()}
    if len(set(counts.values())) > 1:
        raise CalibrationError(
            where, "the same number of samples for every input", counts, "Give every input the same first axis"
        )
    return feeds


def _numbers(value: Any, where: str, what: str) -> np.ndarray:
    """An array of real numbers."""
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever the object says of itself (symbolic, ragged, on another device)
        raise CalibrationError(
            where,
            f"numbers for {what}",
            f"{type(value).__name__}: {error}",
            "A batch is x, a dict of inputs, or (x, y[, w]): make x an array of numbers",
        ) from error
    # Number types that numpy does not know (bfloat16) are kind V, and convert.
    if array.dtype.kind not in "biufV" or array.dtype.names:
        raise CalibrationError(
            where,
            f"numbers for {what}",
            f"{type(value).__name__} of dtype {array.dtype}",
            "A batch is x, a dict of inputs, or (x, y[, w]): make x an array of numbers",
        )
    return array


def _array(value: Any, graph: Graph, name: str, where: str) -> np.ndarray:
    tensor = graph.tensors[name]
    given = _numbers(value, where, f"input {name!r}")
    with np.errstate(over="ignore", invalid="ignore"):
        array = given.astype(tensor.dtype, copy=False)
    fits = array.ndim == len(tensor.shape) and all(
        want is None or have == want for have, want in zip(array.shape[1:], tensor.shape[1:], strict=True)
    )
    if not fits:
        raise CalibrationError(
            where,
            f"input {name!r} of shape {tensor.shape} (None: any)",
            f"shape {array.shape}",
            "A batch has the samples on axis 0; a tuple of x and y is one batch only inside a list: [(x, y)]",
        )
    if array.shape[0] == 0:
        raise CalibrationError(where, "at least one sample", f"shape {array.shape}", "Leave empty batches out")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CalibrationError(
            where,
            f"finite values for input {name!r}",
            "NaN or infinity",
            "Repair or leave out the samples that have them",
        )
    if array.dtype.kind in "iu" and not np.array_equal(array, given):
        raise CalibrationError(
            where,
            f"whole numbers for input {name!r}, which are looked up",
            f"dtype {given.dtype}",
            "Convert the indices to integers, as int32",
        )
    return array


def calibrate(graph: Graph, data: Any, observer: str = "auto") -> None:
    """Set the ranges of a quantized model's graph from data.

    The model runs in inference mode on quantized weights and unquantized activations, op by op. With `"auto"` the
    ranges of the model's inputs are first chosen by what they do to its outputs (`kquant.core.input_range`), since
    inputs hold rare sentinel values (digital silence, missing values) that a range need not cover.

    Args:
        graph: a quantized model that was read; its `fake_quant` ops hold the quantizers.
        data: see `batches`.
        observer: `"auto"` (min-max; MSE at 4 bits and less), `"minmax"`, `"percentile"`, `"mse"` or `"ema"`.
    """
    stream = batches(data, graph)
    head = first_batches(stream)
    watch = Watch(observer, input_ranges(graph, head) if observer == "auto" else {})
    for feeds in itertools.chain(head, stream):
        walk(graph, feeds, watch)
    watch.set_ranges(graph)
    reach = Reach(watch)
    if reach.cut:
        for feeds in head:
            walk(graph, feeds, reach)
        reach.set_shares(graph)
    _warn_clipped(watch.clipped)


def first_batches(stream: Iterator[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The first batches of a stream, of at least `HEAD` samples in all if there are as many."""
    head, count = [], 0
    for feeds in stream:
        head.append(feeds)
        count += len(next(iter(feeds.values())))
        if count >= HEAD:
            break
    return head


class Watch:
    """Visits every fake quantization of a run, observes what flows in, and lets it through unquantized."""

    def __init__(self, observer: str, limits: Mapping[str, tuple[np.float32, np.float32]]):
        self.observer, self.limits = observer, limits
        self.watchers: dict[tuple[str, int], Observer] = {}
        self.ranges: dict[tuple[str, int], tuple[float, float]] = {}
        self.clipped: dict[str, list[int]] = {}

    def __call__(self, op: Op, inputs: list[Any], outputs: list[Any]) -> list[Any] | None:
        """Take in what flows into a fake quantization; what is returned takes the place of its output."""
        if op.kind != "fake_quant":
            return None
        quantizer, site = op.attrs["quantizer"], op.attrs["site"]
        if op.id in self.limits:
            return [np.clip(np.asarray(inputs[0]), *self.limits[op.id])]
        if site is not None:
            key = (op.attrs["spec"], site)
            if key not in self.watchers:
                self.watchers[key] = make_observer(self.observer, quantizer.bits, quantizer.symmetric, quantizer.nonneg)
            self.watchers[key].update(np.asarray(inputs[0], np.float32), op.inputs[0])
        elif op.attrs.get("unit"):
            values = np.asarray(inputs[0])
            tally = self.clipped.setdefault(op.inputs[0], [0, 0])
            tally[0] += int((values > 1).sum())
            tally[1] += values.size
            return None
        return inputs

    def set_ranges(self, graph: Graph) -> None:
        """Hand the ranges that were found to the quantizers."""
        producers = graph.producers()
        for op in graph.ops:
            if op.kind != "fake_quant" or op.attrs["site"] is None:
                continue
            key, quantizer = (op.attrs["spec"], op.attrs["site"]), op.attrs["quantizer"]
            if op.id in self.limits:
                quantizer.set_range(*self.limits[op.id], op.attrs["site"], held=True)
            elif key in self.watchers:
                low, high = self.watchers[key].range(op.inputs[0])
                low, high = _wide_enough(graph, producers, op, low, high)
                quantizer.set_range(low, high, op.attrs["site"])
                self.ranges[key] = float(low), float(high)


class Reach:
    """Visits every fake quantization of a second run, on the ranges now set: what of a batch's extremes they cover.

    In training a range that leaves out the rarest values follows the extremes of the batches, in proportion. These are
    extremes of quantized activations: what was cut off in one tensor reaches no further one. Measured on unquantized
    values the shares would be too small, and each range in a row of layers would shrink by more than the one before.

    Args:
        watch: of the first run.
    """

    def __init__(self, watch: Watch):
        self.cut = {key: watch.ranges[key] for key in watch.ranges if watch.watchers[key].cuts}
        self.typical: dict[tuple[str, int], _Typical] = {}

    def __call__(self, op: Op, inputs: list[Any], outputs: list[Any]) -> None:
        """Take in what flows into a fake quantization."""
        key = (op.attrs.get("spec"), op.attrs.get("site"))
        if op.kind == "fake_quant" and key in self.cut:
            self.typical.setdefault(key, _Typical()).update(np.asarray(inputs[0], np.float32))

    def set_shares(self, graph: Graph) -> None:
        """Hand the shares that were found to the quantizers; their ranges stay as they are."""
        for op in graph.ops:
            key = (op.attrs.get("spec"), op.attrs.get("site"))
            if op.kind == "fake_quant" and key in self.typical:
                low, high = self.cut[key]
                op.attrs["quantizer"].set_range(low, high, op.attrs["site"], self.typical[key].shares(low, high))


def _wide_enough(
    graph: Graph, producers: Mapping[str, Op], op: Op, low: np.float32, high: np.float32
) -> tuple[np.float32, np.float32]:
    """The range of a mean, at least one step of what it averages, divided by their number.

    The mean of a tensor that is centred already (a normalization behind a normalization) is nothing but float32's
    rounding in calibration, where activations are not quantized yet; with quantized ones it comes in those steps.
    """
    mean = producers.get(op.inputs[0])
    marker = producers.get(mean.inputs[0]) if mean is not None and mean.kind == "mean" else None
    if mean is None or marker is None or marker.kind != "fake_quant":
        return low, high
    counts = [math.prod(n for n in graph.tensors[t].shape if n is not None) for t in (mean.inputs[0], mean.output)]
    first, last = marker.attrs["quantizer"].range()
    step = (float(last) - float(first)) / (2 ** marker.attrs["quantizer"].bits - 1)
    least = np.float32(step * counts[1] / counts[0])
    if high - low >= least:
        return low, high
    return (low if op.attrs["quantizer"].nonneg else np.float32(-least)), least


@dataclass
class _Typical:
    """The mean over batches of a tensor's least and greatest value: what a moving average in training will find."""

    low: float = 0.0
    high: float = 0.0
    batches: int = 0

    def update(self, values: np.ndarray) -> None:
        """Take in one batch."""
        self.batches += 1
        self.low += (float(values.min(initial=0.0)) - self.low) / self.batches
        self.high += (float(values.max(initial=0.0)) - self.high) / self.batches

    def shares(self, low: float, high: float) -> tuple[float, float]:
        """A range as a multiple of a batch's extremes; 1 at an end that is zero."""
        pairs = ((low, self.low), (high, self.high))
        below, above = (chosen / extreme if chosen * extreme > 0 else 1.0 for chosen, extreme in pairs)
        return below, above


def _warn_clipped(clipped: dict[str, list[int]]) -> None:
    """DoReFa clips activations to [0, 1]: tell a pretrained net's owner how much that cuts off."""
    over = {name: above / total for name, (above, total) in clipped.items() if above}
    if over:
        worst = max(over, key=over.__getitem__)
        warnings.warn(
            f"DoReFa clips activations to [0, 1]; in calibration {sum(v[0] for v in clipped.values())} of "
            f"{sum(v[1] for v in clipped.values())} values exceeded 1 (most in {worst!r}: {over[worst]:.1%}). "
            "A pretrained network needs training, or smaller activations.",
            stacklevel=4,
        )
