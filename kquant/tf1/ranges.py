"""One activation range in a graph: its variables, how training batches move it, and the fake quantizations on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.plan import Site, Spec
from kquant.tf1 import marks
from kquant.tf1.quantizers import FIELDS, field_name
from kquant.tf1.state import State
from kquant.tf_numerics import NO_BATCH, Observed, fake_quantize_range, observe, range_in_force

_FIRST = {"covered_low": 1.0, "covered_high": 1.0}


class Range:
    """A range that one or several tensors share.

    Every site has variables of its own: runs of a graph order nothing by themselves, and sites that wrote to one
    variable would lose each other's updates. A site sees the sites before it as they are after this run's batch and
    those behind it as they were before, which is how they would run one after the other.

    Args:
        spec: of the plan.
        base: the scope of its variables.
        state: adds them.
        decay: of the exponential moving average.
        training: whether batches move it.
        trains: whether those of a run do, as a tensor; None for all runs.
    """

    def __init__(self, spec: Spec, base: str, state: State, decay: float, training: bool, trains: Any = None):
        self.spec, self.base, self.state, self.decay, self.training = spec, base, state, decay, training
        self.trains = trains
        self.fixed: list[float] | None = [0.0, 1.0] if spec.unit else None
        if spec.fixed is not None:
            self.fixed = [float(spec.fixed.dequantize(np.array(q))) for q in (spec.fixed.qmin, spec.fixed.qmax)]
        self.sites = 0 if self.fixed else max(spec.sites, 1)
        self.variables = [self._variables(i) for i in range(self.sites)]
        self.frozen = None if self.fixed else state.variable(f"{base}/frozen", np.float32(0.0))
        self.updates: dict[int, tuple[list[Any], dict[str, Any]]] = {}  # of the sites so far: ops, values after them
        self.reads: dict[int, list[Any]] = {}  # of sites to come, what has to be read before they update

    def _variables(self, site: int) -> dict[str, Any]:
        return {
            field: self.state.variable(
                field_name(self.base, field, site), np.full(1, _FIRST.get(field, 0.0), np.float32)
            )
            for field in FIELDS
        }

    def apply(self, x: Any, site: Site, replaces: bool) -> Any:
        """The fake-quantized tensor.

        Args:
            x: the tensor.
            site: of the plan.
            replaces: whether all readers of the tensor see the result.
        """
        wide = tf.cast(x, tf.float32)
        before: list[Any] = []
        batch: tuple[Any, Any] = NO_BATCH
        if self.training and site.index is not None and not self.fixed:
            before, batch = self._observe(wide, site.index)
        low, high, seen = self._in_force(batch)
        value = fake_quantize_range(wide, low, high, self.spec.bits)
        ready = self._ready(seen)
        if ready is not None:
            value = tf.where(ready, value, wide)
        with tf.control_dependencies(before):
            result = tf.identity(value, "quantized")
        marks.put(
            result.op, marks.FAKE_QUANT, spec=self.spec.id, site=site.index, input=x.name, replaces=replaces,
            boundary=site.boundary, bits=self.spec.bits, symmetric=self.spec.symmetric, nonneg=self.spec.nonneg,
            fixed=self.fixed, sites=self.sites, variables=self.base, start_step=self.spec.start_step,
            step=self.state.step_name(self.spec.start_step),
        )  # fmt: skip
        return result

    def _ready(self, seen: Any) -> Any:
        """Whether quantization is on, as a tensor; None where it always is."""
        started = self.state.started(self.spec.start_step)
        if self.fixed or (self.training and self.trains is None):
            return started
        return seen if started is None else tf.logical_and(started, seen)

    def _observe(self, x: Any, index: int) -> tuple[list[Any], tuple[Any, Any]]:
        """Take in a batch; returns the ops that write what was found, and what `_in_force` takes."""
        own = self.variables[index]
        with tf.control_dependencies(self.reads.get(index, [])):
            state = Observed(**{f: own[f].read_value() for f in FIELDS}, frozen=self._is_still())
        taken = observe(x, state, 0, self.spec.nonneg, self.decay)
        values = {field: getattr(taken, field) for field in ("minimum", "maximum", "seen")}
        with tf.control_dependencies([*self.reads.get(index, []), *state]):
            writes = [own[f].assign(v, read_value=False) for f, v in values.items()]
        self.updates[index] = writes, values
        return writes, (taken.low, taken.high)

    def _is_still(self) -> Any:
        frozen = self.frozen.read_value()
        return frozen if self.trains is None else tf.where(self.trains, frozen, tf.ones_like(frozen))

    def _in_force(self, batch: tuple[Any, Any]) -> tuple[Any, Any, Any]:
        """Low and high end over all sites, for a batch in training, and whether there is a range at all."""
        if self.fixed:
            return tf.constant(self.fixed[0]), tf.constant(self.fixed[1]), None
        parts = [self._now(i) for i in range(self.sites)]
        minimum, maximum, seen = (
            parts[0][f] if len(parts) == 1 else tf.concat([p[f] for p in parts], 0)
            for f in ("minimum", "maximum", "seen")
        )
        low, high = range_in_force(minimum, maximum, self.spec.bits, self.spec.symmetric, batch)
        return low, high, tf.reduce_max(seen) > 0

    def _now(self, index: int) -> dict[str, Any]:
        if index in self.updates:
            return self.updates[index][1]
        read = {f: self.variables[index][f].read_value() for f in ("minimum", "maximum", "seen")}
        if self.training:
            self.reads.setdefault(index, []).extend(read.values())
        return read
