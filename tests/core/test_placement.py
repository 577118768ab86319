"""Placement rules on graphs written by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hand_placed import DEFAULT, graph, placed, site, spec

from kquant.core.affine import Affine
from kquant.core.errors import ConfigError, UnsupportedError
from kquant.core.int8_spec import ROWS
from kquant.core.stages import stages
from kquant.core.target import TFLITE

TWO = (("a", "conv2d", "x"), ("b", "conv2d", "x"))


# -- free and shared --------------------------------------------------------------------------------------------------


def test_free_outputs_have_a_range_each_and_the_input_has_one():
    plan = placed(graph(*TWO, ("sum", "add", "ab")))
    assert sorted(plan.sites) == ["a", "b", "sum", "x"]
    assert len({site(plan, t).spec for t in plan.sites}) == 4
    assert plan.edges == {}
    assert plan.floats == {}
    assert sorted(plan.weights) == ["a", "b"]


def test_a_shared_op_joins_the_ranges_around_it():
    plan = placed(graph(*TWO, ("cat", "concat", "ab"), ("pool", "max_pool2d", ["cat"]), ("c", "conv2d", ["pool"])))
    assert site(plan, "a").spec == site(plan, "b").spec
    assert spec(plan, "a").sites == 2  # both tensors are observed, and the range is their union
    assert {site(plan, "a").index, site(plan, "b").index} == {0, 1}
    assert "cat" not in plan.sites  # a concatenation of quantized tensors is on their grid already
    assert "pool" not in plan.sites
    assert site(plan, "c").spec != site(plan, "a").spec


def test_a_shared_op_that_computes_new_values_rounds_to_the_same_grid():
    plan = placed(graph(("a", "conv2d", "x"), ("pool", "avg_pool2d", "a"), ("c", "conv2d", ["pool"])))
    assert site(plan, "pool").spec == site(plan, "a").spec
    assert site(plan, "pool").index is None  # it rounds, and does not observe


def test_joining_reaches_through_chains_of_shared_ops():
    """Two concatenations with an operand in common: one range for all of them."""
    ops = (*TWO, ("c", "conv2d", "x"), ("one", "concat", "ab"), ("two", "concat", "bc"))
    plan = placed(graph(*ops, ("d", "conv2d", ["one"]), ("e", "conv2d", ["two"]), outputs=("d", "e")))
    assert len({site(plan, t).spec for t in "abc"}) == 1
    assert spec(plan, "a").sites == 3


def test_a_mean_has_a_range_of_its_own():
    plan = placed(graph(("a", "conv2d", "x"), ("gap", "mean", "a"), ("c", "dense", ["gap"])))
    assert site(plan, "gap").spec != site(plan, "a").spec


def test_a_fused_activation_is_quantized_once_behind_it():
    plan = placed(graph(("a", "conv2d", "x"), ("r", "relu", "a", {"max": None, "fn": "relu"}), ("c", "conv2d", "r")))
    assert "a" not in plan.sites
    assert spec(plan, "r").nonneg


# -- sums that a kernel computes before it rounds ---------------------------------------------------------------------

SUMMING = replace(TFLITE, rows={**ROWS, "conv2d": replace(ROWS["conv2d"], sums_axes=2)})  # tensors here have two axes
RELU = {"max": None, "fn": "relu"}


def summed(*ops: tuple, config: tuple = ()) -> tuple[list[str], set[str]]:
    """The stages of a graph on a target that sums, in order, and the tensors with a range."""
    made = graph(*ops)
    plan = placed(made, *config, target=SUMMING)
    return [" ".join(o.id for o in stage.ops) for stage in stages(made, target=SUMMING)], set(plan.sites)


def test_a_sum_joins_the_kernel_before_it():
    assert summed(("a", "conv2d", "x"), ("s", "add", "ax"), ("r", "relu", "s", RELU)) == (["a s r"], {"x", "r"})
    assert summed(("a", "conv2d", "x"), ("s", "add", "xa")) == (["a s"], {"x", "s"})


def test_it_stands_behind_what_it_adds():
    """The first convolution takes the sum, whose other operand comes later."""
    ops = (("a", "conv2d", "x"), ("b", "conv2d", "x"), ("p", "max_pool2d", "b"), ("s", "add", "ap"))
    assert summed(*ops) == (["b", "p", "a s"], {"x", "b", "s"})
    assert summed(*TWO, ("s", "add", "ab")) == (["b", "a s"], {"x", "b", "s"})


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        ((("a", "dense", "x"), ("s", "add", "ax")), ["a", "s"]),  # its row does not sum
        ((("a", "conv2d", "x"), ("s", "add", "aa")), ["a", "s"]),  # with itself
        ((("a", "conv2d", "x"), ("s", "add", "ax"), ("t", "add", "sa")), ["a", "s", "t"]),  # read twice
        ((("a", "conv2d", "x"), ("s", "add", "ax"), ("t", "add", "sx")), ["a s", "t"]),  # one sum only
        ((("a", "conv2d", "x"), ("r", "relu", "a", RELU), ("s", "add", "rx")), ["a r", "s"]),  # behind its ReLU
        ((("a", "conv2d", "x"), ("s", "sub", "ax")), ["a", "s"]),
    ],
)
def test_where_it_does_not_it_stays_an_op_of_its_own(ops, expected):
    assert summed(*ops)[0] == expected


def test_a_sum_that_no_entry_quantizes_is_not_taken():
    ops = (("a", "conv2d", "x"), ("s", "add", "ax"))
    for entry in ({"op_names": ["s"], "exclude": True}, {"op_names": ["s"], "q_bits": {"weight": 8, "output": 32}}):
        assert summed(*ops, config=(DEFAULT, entry))[1] == {"x", "a"}
    assert summed(*ops, config=({"q_bits": 8, "op_types": ["Conv2D"]},))[1] == {"x", "a"}
    assert summed(*ops, config=(DEFAULT, {"op_names": ["s"], "q_bits": 4}))[1] == {"x", "s"}


def test_the_plan_says_that_it_is_not_quantized_before_the_sum():
    (row,) = placed(graph(("a", "conv2d", "x"), ("s", "add", "ax")), target=SUMMING).rows
    assert row.note == "fused: s; not quantized before the sum"


# -- fixed ------------------------------------------------------------------------------------------------------------


def test_fixed_parameters_are_the_specifications():
    """TensorFlow Lite 8-bit quantization specification: LOGISTIC and SOFTMAX 1/256 at -128, TANH 1/128 at 0."""
    ops = (("a", "conv2d", "x"), ("s", "sigmoid", "a"), ("t", "tanh", "s"), ("m", "softmax", "t"))
    plan = placed(graph(*ops))
    assert spec(plan, "s").fixed == spec(plan, "m").fixed == Affine(np.float32(1 / 256), -128, 8)
    assert spec(plan, "t").fixed == Affine(np.float32(1 / 128), 0, 8)
    assert site(plan, "s").index is None


def test_where_fixed_meets_shared_the_fixed_operand_is_requantized():
    ops = (("a", "conv2d", "x"), ("b", "conv2d", "x"), ("s", "sigmoid", "b"), ("cat", "concat", "as"))
    plan = placed(graph(*ops, ("c", "conv2d", ["cat"])))
    assert list(plan.edges) == [("cat", 1)]
    assert plan.edges["cat", 1].spec == site(plan, "a").spec
    assert spec(plan, "a").fixed is None
    assert spec(plan, "a").sites == 2  # what the requantize sees counts as well
    assert spec(plan, "s").fixed is not None  # other readers of the sigmoid keep its own grid
    (row,) = [r for r in plan.rows if r.layer == "cat"]
    assert "requantize input 1" in row.note


def test_a_fixed_operand_is_the_one_to_requantize_also_where_it_comes_first():
    ops = (*TWO, ("s", "sigmoid", "b"), ("cat", "concat", "sa"), ("c", "conv2d", ["cat"]))
    plan = placed(graph(*ops))
    assert list(plan.edges) == [("cat", 0)]
    assert plan.edges["cat", 0].spec == site(plan, "a").spec


def test_fixed_operands_alone_share_their_parameters():
    ops = (*TWO, ("s", "sigmoid", "a"), ("t", "sigmoid", "b"), ("cat", "concat", "st"), ("c", "conv2d", ["cat"]))
    plan = placed(graph(*ops))
    assert plan.edges == {}
    assert site(plan, "s").spec == site(plan, "t").spec
    assert spec(plan, "s").fixed == ROWS["sigmoid"].fixed


def test_different_widths_meet_in_a_requantize():
    plan = placed(
        graph(*TWO, ("cat", "concat", "ab"), ("c", "conv2d", ["cat"])), DEFAULT, {"q_bits": 4, "op_names": ["b"]}
    )
    assert (spec(plan, "a").bits, spec(plan, "b").bits) == (8, 4)
    assert list(plan.edges) == [("cat", 1)]
    assert plan.edges["cat", 1].spec == site(plan, "a").spec


# -- symmetric operands -----------------------------------------------------------------------------------------------


def test_a_square_its_mean_and_its_sum_are_not_negative():
    """A variance: with a range below zero its reciprocal root would be asked for negative values."""
    plan = placed(graph(*TWO, ("q", "mul", "aa"), ("m", "mean", "q"), ("s", "sum", "q"), outputs=("m", "s")))
    assert [spec(plan, t).nonneg for t in "aqms"] == [False, True, True, True]


def test_the_second_operand_of_a_batch_matmul_is_symmetric():
    plan = placed(graph(*TWO, ("m", "batch_matmul", "ab")))
    assert spec(plan, "b").symmetric
    assert not spec(plan, "a").symmetric
    assert plan.edges == {}


def test_a_fixed_second_operand_is_requantized_to_a_symmetric_range():
    plan = placed(graph(*TWO, ("s", "sigmoid", "b"), ("m", "batch_matmul", "as")))
    assert list(plan.edges) == [("m", 1)]
    assert plan.specs[plan.edges["m", 1].spec].symmetric
    assert not spec(plan, "s").symmetric


def test_tanh_is_symmetric_as_it_is():
    plan = placed(graph(*TWO, ("t", "tanh", "b"), ("m", "batch_matmul", "at")))
    assert plan.edges == {}


# -- entries ----------------------------------------------------------------------------------------------------------


def test_model_inputs_and_outputs_stay_8_bit_unless_named():
    net = graph(("a", "conv2d", "x"), ("b", "conv2d", "a"), ("flat", "reshape", "b"))
    plan = placed(net, {"q_bits": 4, "op_types": ["default"]})
    assert [spec(plan, t).bits for t in "xab"] == [8, 4, 8]  # through the reshape, b is the output
    assert [plan.weights[t].bits for t in "ab"] == [4, 4]
    named = placed(net, {"q_bits": 4, "op_types": ["default"]}, {"q_bits": 4, "op_names": ["b"]})
    assert spec(named, "b").bits == 4


def test_the_last_matching_entry_wins_whole():
    net = graph(("a", "conv2d", "x"), ("b", "conv2d", "a"), ("c", "conv2d", "b"))
    first = {"q_bits": {"weight": 2, "output": 3}, "op_types": ["Conv2D"]}
    last = {"q_bits": {"weight": 5}, "op_names": ["b"]}
    plan = placed(net, first, last)
    assert [plan.weights[t].bits for t in "abc"] == [2, 5, 2]
    assert [spec(plan, t).bits for t in "ab"] == [3, 8]  # the last entry's own default, not the first entry's 3
    turned = placed(net, last, first)
    assert [turned.weights[t].bits for t in "abc"] == [2, 2, 2]


def test_fused_ops_with_contradictory_entries_are_refused_by_both_indices():
    net = graph(("a", "conv2d", "x"), ("r", "relu", "a", {"max": None, "fn": "relu"}), ("c", "conv2d", "r"))
    config = (DEFAULT, {"q_bits": 4, "op_names": ["a"]}, {"q_bits": 6, "op_names": ["r"]})
    with pytest.raises(ConfigError, match=r"config_list\[1\] and config_list\[2\].*a, r.*4 and 6"):
        placed(net, *config)
    assert spec(placed(net, *config[:2]), "r").bits == 4  # with one entry, it is the one for the whole stage


def few_input_bits(name, bits):
    return {"q_bits": {"weight": 8, "input": bits, "output": 8}, "op_names": [name]}


@pytest.mark.parametrize("named", ["a", "b"])
def test_the_bits_of_an_input_do_not_depend_on_which_of_its_readers_comes_first(named):
    net = graph(("a", "conv2d", "x"), ("b", "conv2d", "x"))
    assert spec(placed(net, DEFAULT, few_input_bits(named, 4)), "x").bits == 4
    assert spec(placed(net, DEFAULT, few_input_bits("a", 4), few_input_bits("b", 4)), "x").bits == 4


@pytest.mark.parametrize("second", [few_input_bits("b", 6), {"q_bits": 6, "op_names": ["x"]}])
def test_contradictory_bits_of_one_input_are_refused_by_both_indices(second):
    net = graph(("a", "conv2d", "x"), ("b", "conv2d", "x"))
    with pytest.raises(ConfigError, match=r"config_list\[.\] and config_list\[.\].*'x'") as caught:
        placed(net, DEFAULT, few_input_bits("a", 4), second)
    assert {*caught.value.where.split(" and ")} == {"config_list[1]", "config_list[2]"}
    assert {*caught.value.received.split(" and ")} == {"4", "6"}


def test_an_integer_op_cannot_read_its_input_in_float():
    with pytest.raises(ConfigError, match=r"config_list\[1\]: input 'x' must be quantized: 'a' reads it in integers"):
        placed(graph(("a", "conv2d", "x")), DEFAULT, few_input_bits("a", 32))


def test_an_op_that_no_entry_matches_stays_float_with_the_reason():
    plan = placed(graph(("a", "conv2d", "x"), ("b", "dense", "a")), {"q_bits": 8, "op_types": ["Conv2D"]})
    assert plan.floats == {"b": "no config entry matches it"}
    assert plan.integer == {"a"}
    assert "b" not in plan.weights
    (row,) = [r for r in plan.rows if r.layer == "b"]
    assert (row.output, row.kernel, row.note) == ("float", "float", "no config entry matches it")


def test_a_shared_op_that_no_entry_matches_follows_its_input():
    net = graph(("a", "conv2d", "x"), ("flat", "reshape", "a"), ("b", "dense", ["flat"]))
    plan = placed(net, {"q_bits": 8, "op_types": ["Conv2D", "Dense"]})
    assert plan.floats == {}
    assert "flat" in plan.integer
    other = placed(net, {"q_bits": 8, "op_types": ["Dense"]})
    assert sorted(other.floats) == ["a", "flat"]  # its input is float


def test_excluded_ops_are_float_with_the_entry_that_says_so():
    plan = placed(graph(("a", "conv2d", "x"), ("b", "dense", "a")), DEFAULT, {"op_names": ["b"], "exclude": True})
    assert plan.floats == {"b": "excluded by config_list[1]"}


def test_an_unsupported_op_is_refused_with_the_entry_that_excludes_it():
    net = graph(("a", "conv2d", "x"), ("deep", "lstm", "a", {"reason": "its state has no kernel"}))
    with pytest.raises(UnsupportedError, match=r"'deep' \(LSTM\): its state has no kernel.*exclude"):
        placed(net, DEFAULT)
    assert "deep" in placed(net, DEFAULT, {"op_names": ["deep"], "exclude": True}).floats


def test_one_bit_is_for_outputs_that_are_never_negative():
    one = {"q_bits": {"weight": 8, "output": 1}, "op_names": ["a"]}
    rectified = graph(("a", "conv2d", "x"), ("r", "relu", "a", {"max": None, "fn": "relu"}), ("c", "conv2d", "r"))
    assert spec(placed(rectified, DEFAULT, one), "r").bits == 1
    signed = graph(("a", "conv2d", "x"), ("c", "conv2d", "a"))
    with pytest.raises(ConfigError, match=r"config_list\[1\]\['q_bits'\].*non-negative.*'a'.*Received: 1"):
        placed(signed, DEFAULT, one)


def test_dorefas_range_is_the_unit_interval_behind_non_negative_activations_only():
    ops = (("a", "conv2d", "x"), ("r", "relu", "a", {"max": None, "fn": "relu"}), ("b", "conv2d", "r"))
    ops = (*ops, ("g", "elementwise", "b", {"fn": "gelu"}), ("c", "conv2d", "g"))
    plan = placed(graph(*ops), {"q_bits": 2, "op_types": ["default"], "quantizer": "dorefa"})
    assert [spec(plan, t).unit for t in "rbgcx"] == [True, False, False, False, False]
    assert [spec(plan, t).bits for t in "rbgcx"] == [2, 8, 2, 8, 8]
    assert site(plan, "r").index is None


def test_sixteen_bit_operands_are_requantized_to_the_width_of_the_output():
    wide = {"q_bits": {"weight": 8, "output": 16}, "op_names": ["a"]}
    plan = placed(graph(*TWO, ("sum", "add", "ab"), ("c", "conv2d", ["sum"])), DEFAULT, wide)
    assert spec(plan, "a").bits == 16
    assert plan.specs[plan.edges["sum", 0].spec].bits == 8
    assert ("sum", 1) not in plan.edges


def test_sixteen_bits_are_refused_by_name_where_the_kernel_is_too_coarse():
    net = graph(("up", "conv2d_transpose", "x"), ("c", "conv2d", ["up"]))
    with pytest.raises(UnsupportedError, match=r"'up'.*16-bit.*q_bits"):
        placed(net, DEFAULT, {"q_bits": {"weight": 8, "output": 16}, "op_names": ["up"]})


# -- the ends of the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["softmax", "sigmoid", None])
def test_logits_are_8_bits_whether_or_not_the_model_holds_its_last_function(last):
    ops = [("hidden", "dense", ["x"]), ("logits", "dense", ["hidden"])]
    model = graph(*ops, *([("y", last, ["logits"])] if last else []))
    plan = placed(model, {**DEFAULT, "q_bits": 4})
    assert (spec(plan, "hidden").bits, spec(plan, "logits").bits) == (4, 8)
    plan = placed(model, {**DEFAULT, "q_bits": 4}, {"q_bits": 4, "op_names": ["logits"]})
    assert spec(plan, "logits").bits == 4


# -- one scale for a kernel and its norm ------------------------------------------------------------------------------

TENSOR = {"q_bits": 8, "op_types": ["default"], "quant_scheme": {"weight": "tensor_symmetric"}}


@pytest.mark.parametrize(
    ("entry", "normalizes", "folds"),
    [
        (TENSOR, True, "n"),
        (TENSOR, False, None),
        (DEFAULT, True, None),
        ({"q_bits": 4, "op_types": ["default"], "quantizer": "dorefa"}, True, None),
    ],
)
def test_a_range_per_tensor_takes_the_batch_norm_in(entry, normalizes, folds):
    net = graph(("c", "conv2d", "x"), ("n", "channel_affine", "c", {"normalizes": normalizes, "kernel_axes": None}))
    plan = placed(net, entry)
    assert plan.weights["c"].folds_norm == folds
    assert ("one scale with n" in plan.rows[0].note) == (folds is not None)
