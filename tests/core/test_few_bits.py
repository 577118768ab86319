"""Where output bits fewer than 8 apply: behind sums and activation functions, and to what a layer gives."""

from __future__ import annotations

from dataclasses import replace

from hand_placed import graph, placed, spec

from kquant.core.graph import Graph
from kquant.core.plan import Plan

FEW = {"q_bits": {"weight": 4, "output": 4}, "op_types": ["default"]}
GELU = {"fn": "gelu"}


def bits(plan: Plan, tensors: str) -> list[int]:
    return [spec(plan, t).bits for t in tensors]


def in_layer(graph: Graph, layer: str, names: str) -> Graph:
    """The graph with some ops made the parts of one layer."""
    return graph.replace(ops=tuple(replace(op, layer=layer) if op.id in names else op for op in graph.ops))


def test_few_bits_apply_behind_the_sum_and_behind_the_activation_function():
    bypass = graph(("r", "conv2d", "x"), ("a", "conv2d", "r"), ("s", "add", "ar"), ("c", "conv2d", "s"))
    assert bits(placed(bypass, FEW), "ras") == [4, 8, 4]
    function = graph(("a", "conv2d", "x"), ("g", "elementwise", "a", GELU), ("c", "conv2d", "g"))
    plan = placed(function, FEW)
    assert bits(plan, "ag") == [8, 4]
    assert [row.note for row in plan.rows] == ["4 bit further on", "", ""]


def test_few_bits_apply_at_once_where_something_else_reads_the_result_too():
    ops = (("a", "conv2d", "x"), ("g", "elementwise", "a", GELU), ("b", "conv2d", "a"), ("s", "add", "gb"))
    assert bits(placed(graph(*ops, ("c", "conv2d", "s")), FEW), "agbs") == [4, 4, 8, 4]


def test_an_activation_that_only_a_sum_reads_keeps_its_bits():
    ops = (("a", "conv2d", "x"), ("r", "relu", "a", {"max": None, "fn": "relu"}), ("g", "elementwise", "x", GELU))
    assert bits(placed(graph(*ops, ("s", "add", "rg"), ("c", "conv2d", "s")), FEW), "rgs") == [4, 4, 4]


def test_other_bits_asked_of_the_sum_leave_each_its_own():
    ops = graph(("a", "conv2d", "x"), ("b", "conv2d", "x"), ("s", "add", "ab"), ("c", "conv2d", "s"))
    assert bits(placed(ops, FEW, {"q_bits": 6, "op_names": ["s"]}), "abs") == [4, 4, 6]
    assert bits(placed(ops, {"q_bits": 4, "op_types": ["Conv2D"]}, {"q_bits": 8, "op_names": ["s"]}), "as") == [4, 8]


def test_terms_of_a_layers_formula_have_8_bits_and_what_its_products_read_has_few():
    chain = (("m", "mean", "x"), ("d", "sub", "xm"), ("q", "mul", "dd"), ("n", "mul", "dq"), ("c", "conv2d", "n"))
    assert bits(placed(in_layer(graph(*chain), "norm", "mdqn"), FEW), "mdqn") == [8, 8, 8, 4]
    assert bits(placed(graph(*chain), FEW), "mdqn") == [4, 4, 4, 4]
    product = (("a", "dense", "x"), ("t", "transpose", "a"), ("b", "batch_matmul", "tx"), ("p", "softmax", "b"))
    plan = placed(in_layer(graph(*product, ("o", "batch_matmul", "px"), ("c", "dense", "o")), "mha", "atbpo"), FEW)
    assert bits(plan, "abpo") == [4, 8, 4, 4]


def test_dorefas_unit_interval_is_not_for_terms_of_a_formula():
    chain = (("a", "conv2d", "x"), ("e", "elementwise", "a", {"fn": "rsqrt"}), ("n", "mul", "ae"), ("c", "conv2d", "n"))
    plan = placed(in_layer(graph(*chain), "norm", "aen"), {**FEW, "quantizer": "dorefa"})
    assert [spec(plan, t).unit for t in "en"] == [False, False]
