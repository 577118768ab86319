"""Batch norms that normalize by their batch: their moving averages, and how they are frozen while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.errors import ModelError
from kquant.tf1 import marks
from kquant.tf1.evaluate import BATCH_NORMS
from kquant.tf1.flagged import ROOTS, flagged, freeze_with, value_of
from kquant.tf1.flags import evaluated
from kquant.tf1.match import Found, Matcher
from kquant.tf1.rewire import readers, redirect
from kquant.tf1.state import State, scope_of
from kquant.tf1.statistics import debiased_by
from kquant.tf1.values import Values


@dataclass(frozen=True)
class BatchNorm:
    """One batch norm of a training graph, for the controls.

    Args:
        name: of the graph op that names it.
        mean, variance: op names of the variables that hold its moving averages.
        values: of the graph's variables.
        read: its scale and its offset per channel.
    """

    name: str
    mean: str
    variance: str
    values: Values = field(compare=False)
    read: tuple[Callable[[], Any], Callable[[], Any]] = field(compare=False)

    def set_frozen(self, value: float) -> None:
        """Normalize by the moving averages (1) or by the batch (0) in training.

        Raises:
            ModelError: a graph in its evaluation form.
        """
        name = frozen_name(self.name)
        if not any(op.name == name for op in self.values.graph.get_operations()):
            raise ModelError(
                "graph",
                "a graph for training",
                "its evaluation form, in which statistics stand still",
                "Call it on a session of the graph that was built with training=True",
            )
        self.values.set({name: np.float32(value)})
        self.values.commit()

    def set_statistics(self, mean: Any, variance: Any) -> None:
        """Set the moving averages, float32, one value per channel, and what they are updated from."""
        given = self._shaped(mean, variance)
        self.values.set(given | self._helpers(given))
        self.values.commit()

    def affine_of(self, mean: Any, variance: Any) -> tuple[Any, Any]:
        """Scale and offset that other statistics would give, float64."""
        with self.values.instead(self._shaped(mean, variance)):
            scale, offset = (read() for read in self.read)
        return scale, offset

    def _helpers(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The helpers of debiased averages that give these averages at the step where they are."""
        helpers = {n: h for n, h in debiased_by(self.values.graph).items() if n in given}
        now = self.values.get([*helpers, *helpers.values()])
        found = {}
        for name, helper in helpers.items():
            average = now[name].ravel()
            # One share for all channels. Before the first step it is zero: the averages then start from the next batch.
            share = now[helper].ravel() @ average / max(float(average @ average), np.finfo(np.float32).tiny)
            found[helper] = (given[name] * share).reshape(now[helper].shape)
        return found

    def _shaped(self, mean: Any, variance: Any) -> dict[str, np.ndarray]:
        now = self.values.get([self.mean, self.variance])
        given = {self.mean: mean, self.variance: variance}
        return {n: np.asarray(v, np.float32).reshape(now[n].shape) for n, v in given.items()}


def frozen_name(name: str) -> str:
    """The name of the variable that freezes a batch norm."""
    return f"{scope_of(name)}/frozen"


def statistics_of(m: Matcher, found: Found) -> tuple[Any, Any] | None:
    """The batch statistics (mean and variance) that a scale and offset per channel are made of, or None."""
    if found.anchor.type in BATCH_NORMS and found.anchor.get_attr("is_training"):
        return found.anchor.outputs[1], found.anchor.outputs[2]
    known: dict[str, Any] = {}
    under_root: set[str] = set()
    todo = [(t, False) for t in found.attrs.get("parameters", ())]
    seen: set[tuple[str, bool]] = set()
    while todo:
        tensor, rooted = todo.pop()
        if (tensor.name, rooted) in seen:
            continue
        seen.add((tensor.name, rooted))
        if tensor.name in m.evaluator.statistics:
            known[tensor.name] = tensor
            under_root.update({tensor.name} if rooted else ())
        else:
            chosen = evaluated(tensor)
            behind = tensor.op.inputs if chosen is None else [chosen]
            todo += [(t, rooted or tensor.op.type in ROOTS) for t in behind]
    if len(known) != 2 or len(under_root) != 1:
        return None
    (variance,) = under_root
    return next(t for n, t in known.items() if n != variance), known[variance]


def batch_norm_of(m: Matcher, found: Found) -> BatchNorm | None:
    """The batch norm that an op is in a training graph, or None."""
    if found.kind != "channel_affine":
        return None
    statistics = statistics_of(m, found)
    of_flag = flagged(m, found, statistics)
    if statistics is not None:
        mean, variance = (m.evaluator.statistics[t.name] for t in statistics)
    elif of_flag is not None:
        mean, variance = of_flag.mean, of_flag.variance
    else:
        return None
    read = (found.weights["scale"].read, found.weights["offset"].read)
    return BatchNorm(found.anchor.name, mean, variance, m.evaluator.values, read)


def gain_of(m: Matcher, found: Found, scope: str) -> Any:
    """`|gamma / sigma|` of a scale per channel as a float32 tensor of shape (channels,), without a gradient.

    It is computed anew from the variables, with the moving averages in the place of batch statistics.
    """
    factors = found.attrs["factors"]
    tensors = m.evaluator.inline({}, [f[0].name for f in factors], partial(value_of, m), f"{scope}/gain")
    gain = tf.ones((found.weights["scale"].shape[0],))
    for tensor, (_, how, *epsilon) in zip(tensors, factors, strict=True):
        values = tf.reshape(tensor, [-1])
        steps = {"mul": lambda g, v: g * v, "div": lambda g, v: g / v, "norm": lambda g, v: g * tf.math.rsqrt(v)}
        gain = steps[how](gain, values + epsilon[0] if epsilon else values)
    return tf.stop_gradient(tf.abs(gain))


# -- freezing -------------------------------------------------------------------------------------------------------


def make_freezable(m: Matcher, found: Found, state: State) -> Any | None:
    """Give a batch norm a variable that freezes it; returns what stands for its output, if that is another tensor.

    While it is frozen, its moving averages take the place of the batch statistics wherever those are read, also in the
    ops that update the averages, which then stay as they are.
    """
    statistics = statistics_of(m, found)
    of_flag = flagged(m, found, statistics)
    if statistics is None and of_flag is None:
        return None
    frozen = state.variable(frozen_name(found.anchor.name), np.float32(0.0))
    with tf.name_scope(f"{scope_of(found.anchor.name)}/"):
        is_frozen = frozen.read_value() > 0
        if of_flag is not None:
            freeze_with(m, of_flag, is_frozen)
            return None
        averages = [value_of(m, m.evaluator.statistics[t.name]) for t in statistics]
        if found.anchor.type in BATCH_NORMS:
            result, *chosen = _switched(found.anchor, averages, is_frozen)
        else:
            pairs = zip(statistics, averages, strict=True)
            result, chosen = None, [tf.where(is_frozen, tf.reshape(a, s.shape.as_list()), s) for s, a in pairs]
        for statistic, value in zip(statistics, chosen, strict=True):
            _replace(statistic, value, marks.STATISTIC, [o.op for o in chosen])
    return result


def _switched(op: Any, averages: list[Any], is_frozen: Any) -> list[Any]:
    """The fused kernel in one of its two forms: what it makes, and the mean and variance that it made it with.

    Both forms lie in branches, so that only one of them runs, forwards and backwards.
    """
    x, gamma, beta = op.inputs[:3]
    kernel = partial(tf.compat.v1.nn.fused_batch_norm, x, gamma, beta, epsilon=op.get_attr("epsilon"))
    trained = op.outputs[0]

    def moving() -> tuple[Any, ...]:
        return (kernel(*averages, is_training=False)[0], *averages)

    # With all its intermediates from the start, the op is not changed any more when gradients are built; a session that
    # runs in between would keep it as it was.
    tf.compat.v1.experimental.output_all_intermediates(True)
    y, mean, variance = tf.cond(is_frozen, moving, lambda: kernel(is_training=True))
    tf.compat.v1.experimental.output_all_intermediates(None)
    return [_replace(trained, y, marks.BATCH_NORM, []), mean, variance]


def _replace(tensor: Any, value: Any, kind: str, but: list[Any]) -> Any:
    """Let all readers of a tensor read another value, but for the ops that make it."""
    where = [place for place in readers(tensor) if place[0] not in but]
    result = tf.identity(value, kind)
    marks.put(result.op, kind, input=tensor.name)
    redirect(where, result)
    return result
