"""Padding with a number other than zero."""

import numpy as np
import pytest

import kquant
from kquant.core.affine import Affine
from kquant.core.graph import Graph, Op, Tensor
from kquant.core.padding import check_filler, filler


def padded(value, *readers, paddings=((0, 0), (1, 2), (0, 0))):
    """The padding of a graph, and the graph's consumers."""
    pad = Op("pad", "pad", ("x",), ("pad",), {"paddings": paddings, "value": value})
    ops = [pad, *(Op(f"r{i}", kind, ("pad",), (f"r{i}",), attrs) for i, (kind, attrs) in enumerate(readers))]
    names = ["x", *(op.output for op in ops)]
    graph = Graph(tuple(ops), {n: Tensor(n, (None, 8, 4)) for n in names}, ("x",), tuple(names[1:]))
    return pad, graph.consumers()


WIDE, NARROW = ("max_pool2d", {"pool": (3,)}), ("max_pool2d", {"pool": (2,)})


@pytest.mark.parametrize(
    ("value", "readers", "expected"),
    [
        (0.0, [], None),
        (2.0, [WIDE], 2.0),
        (-5.0, [], -5.0),
        (-5.0, [WIDE], None),
        (-np.inf, [("identity", {})], -np.inf),  # an output
        (-5.0, [WIDE, ("add", {})], -5.0),
        (-5.0, [NARROW], -5.0),  # a window of two numbers that are both padding
        (-5.0, [("reduce_max", {"axes": (1,)})], None),
        (-5.0, [("reduce_max", {"axes": (2,)})], -5.0),
    ],
)
def test_a_low_number_matters_unless_maxima_of_more_than_it_are_taken(value, readers, expected):
    assert filler(*padded(value, *readers)) == expected


def test_another_op_has_none():
    pad, consumers = padded(2.0, WIDE)
    reader = consumers[pad.output][0][0]
    assert filler(reader, consumers) is None


@pytest.mark.parametrize(("value", "held"), [(1.0, True), (1.001, True), (1.005, False), (-0.5, False), (None, True)])
def test_a_number_beyond_the_grid_is_refused(value, held):
    affine = Affine.of_range(0.0, 1.0, 8, "x")
    if held:
        check_filler(value, affine, "x")
        return
    with pytest.raises(kquant.RangeError, match=rf"'x'.*\[0, 1\].*{value}"):
        check_filler(value, affine, "x")
