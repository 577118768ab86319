"""Whether a run of a training graph trains, as far as flags tell: in one that only evaluates, ranges stand still."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from kquant.tf1.flagged import behind
from kquant.tf1.flags import flags_of, predicate, value_in_evaluation
from kquant.tf1.match import Found, Matcher
from kquant.tf1.norms import statistics_of


def trains(m: Matcher, ops: Iterable[Found], needed: Iterable[set[str]]) -> Any | None:
    """Whether a run trains: a conditional on batch norm or dropout takes the branch of training.

    Args:
        m: the matcher.
        ops: of the model.
        needed: for each output, the names of the graph ops that it depends on.

    Returns:
        A boolean tensor; None where no flag tells, or where an output can be had without feeding the flag.
    """
    phases: dict[tuple[str, bool], Any] = {}
    for found in ops:
        part = behind(m, found)
        # With a flag that says that it is a test, an op is as in training while the flag is off.
        trains_off = part.is_random or (bool(part.decided) and statistics_of(m, found) is not None)
        for tensor in part.decided:
            flag = predicate(tensor)
            is_on = value_in_evaluation(flag) is trains_off
            phases[flag.name, is_on] = flag if is_on else tf.logical_not(flag)
    fed = {f.op.name for name, _ in phases for f in flags_of(m.tensor(name)) if f.op.type != "PlaceholderWithDefault"}
    if not phases or any(fed - names for names in needed):
        return None
    return functools.reduce(tf.logical_or, phases.values())
