"""The config_list grammar, against tables written from DESIGN.md."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.core.config import Candidate, Entry, match, parse
from kquant.core.errors import ConfigError

ANY = {"op_types": ["default"]}


def only(**keys):
    (entry,) = parse([{**ANY, **keys}])
    return entry


def bits_of(entry):
    return entry.weight_bits, entry.output_bits, entry.input_bits, entry.gradient_bits


def test_none_is_eight_bits_for_default():
    expected = (Entry(0, ("default",), None, weight_bits=8, output_bits=8, quantizer="qat"),)
    assert parse(None) == parse([{"q_bits": 8, "op_types": ["default"]}]) == parse([ANY]) == expected


def test_entries_keep_their_order_and_selectors():
    one, two = parse(({"op_types": "Conv2D"}, {"op_names": ["a*", "b"], "op_types": ("Dense", "default")}))
    assert (one.index, one.op_types, one.op_names) == (0, ("Conv2D",), None)
    assert (two.index, two.op_types, two.op_names) == (1, ("Dense", "default"), ("a*", "b"))


# keys of the entry -> (weight, output, input, gradient)
BITS = [
    ({}, (8, 8, None, None)),
    ({"q_bits": 4}, (4, 4, None, None)),
    ({"q_bits": np.int64(4)}, (4, 4, None, None)),
    ({"q_bits": 32}, (32, 32, None, None)),
    ({"q_bits": {"weight": 4}}, (4, 8, None, None)),
    ({"q_bits": {"weight": 8, "output": 16}}, (8, 16, None, None)),
    ({"q_bits": {"weight": 8, "output": 1}}, (8, 1, None, None)),
    ({"q_bits": {"input": 6}}, (8, 8, 6, None)),
    ({"q_bits": 5, "quant_types": ["weight"]}, (5, None, None, None)),
    ({"q_bits": 5, "quant_types": "output"}, (None, 5, None, None)),
    ({"q_bits": 1, "quant_types": ["output"]}, (None, 1, None, None)),
    ({"q_bits": 16, "quant_types": ["output", "input"]}, (None, 16, 16, None)),
    ({"q_bits": 6, "quant_types": ["weight", "input", "output"]}, (6, 6, 6, None)),
    ({"q_bits": {"weight": 3}, "quant_types": ["weight", "input"]}, (3, None, 8, None)),
    ({"quant_bits": 4}, (4, 4, None, None)),
    ({"quant_bits": {"weight": 4, "output": 6}}, (4, 6, None, None)),
    ({"q_bits": 4, "quant_bits": {"weight": 4}}, (4, 4, None, None)),
    ({"q_bits": {"weight": 4}, "quant_bits": {"output": 6}}, (4, 6, None, None)),
    ({"quantizer": "dorefa", "q_bits": 1}, (1, 1, None, None)),
    ({"quantizer": "dorefa", "q_bits": {"weight": 1, "output": 2, "gradient": 4}}, (1, 2, None, 4)),
    ({"quantizer": "dorefa", "q_bits": {"gradient": 32}, "quant_types": ["weight"]}, (8, None, None, 32)),
    ({"quantizer": "qat", "q_bits": {"gradient": 32}}, (8, 8, None, 32)),
    ({"quantizer": "naive", "q_bits": 2}, (2, 2, None, None)),
]


@pytest.mark.parametrize(("keys", "expected"), BITS, ids=[str(k) for k, _ in BITS])
def test_bits(keys, expected):
    assert bits_of(only(**keys)) == expected


ALLOWED = {
    ("naive", "weight"): {2, 3, 4, 5, 6, 7, 8, 32},
    ("qat", "weight"): {2, 3, 4, 5, 6, 7, 8, 32},
    ("dorefa", "weight"): {1, 2, 3, 4, 5, 6, 7, 8, 32},
    ("naive", "gradient"): {32},
    ("qat", "gradient"): {32},
    ("dorefa", "gradient"): {1, 2, 3, 4, 5, 6, 7, 8, 32},
    **{(q, r): {1, 2, 3, 4, 5, 6, 7, 8, 16, 32} for q in ("naive", "qat", "dorefa") for r in ("input", "output")},
}


@pytest.mark.parametrize(("quantizer", "role"), ALLOWED)
def test_exactly_the_documented_bits_are_accepted(quantizer, role):
    accepted = set()
    for bits in range(-1, 40):
        try:
            parse([{**ANY, "q_bits": {role: bits}}], quantizer=quantizer)
        except ConfigError as error:
            assert f"config_list[0]['q_bits']['{role}']" in str(error)
            assert str(bits) in str(error)
        else:
            accepted.add(bits)
    assert accepted == ALLOWED[quantizer, role]


def test_schemes_and_other_settings():
    entry = only(
        quant_types=["weight", "input", "output"],
        quant_scheme={"weight": "per_tensor_symmetric", "output": "tensor_symmetric", "input": "tensor_affine"},
        quant_dtype={"weight": "int", "output": "uint"},
        quant_start_step=100,
        exclude=False,
    )
    assert entry.weight_per_channel is False
    assert (entry.output_symmetric, entry.input_symmetric) == (True, False)
    assert (entry.start_step, entry.exclude) == (100, False)
    assert only(quant_scheme={"weight": "channel_symmetric"}).weight_per_channel is True
    assert only(quant_scheme="per_channel_symmetric", quant_types=["weight"]).weight_per_channel is True
    assert only(quant_scheme="tensor_affine", quant_types="output").output_symmetric is False
    plain = only(quant_dtype="int")
    assert (plain.weight_per_channel, plain.output_symmetric, plain.input_symmetric) == (None, False, False)
    both = only(quant_scheme="tensor_symmetric")
    assert (both.weight_per_channel, both.output_symmetric, both.input_symmetric) == (False, True, False)


def test_exclude_quantizes_nothing():
    entry = only(exclude=True, q_bits=32, quantizer="naive")
    assert entry.exclude and bits_of(entry) == (None, None, None, None)


def test_the_quantizer_class_implies_its_quantizer():
    assert [e.quantizer for e in parse([ANY, {**ANY, "quantizer": "dorefa"}], quantizer="dorefa")] == ["dorefa"] * 2
    assert parse(None, quantizer="naive")[0].quantizer == "naive"
    with pytest.raises(ConfigError, match=r"config_list\[1\]\['quantizer'\].*'qat'.*'dorefa'"):
        parse([ANY, {**ANY, "quantizer": "qat"}], quantizer="dorefa")
    with pytest.raises(ConfigError, match="'dorefa'"):
        parse(None, quantizer="DoReFa")


# config_list -> texts that the message has to hold
BAD_LISTS = [
    ({"q_bits": 8}, ["config_list:", "list of dicts", "[...]"]),
    ("default", ["config_list:", "list of dicts", "'default'"]),
    ([], ["config_list:", "at least one entry", "None"]),
    ([ANY, "default"], ["config_list[1]:", "dict", "'default'"]),
    ([{"q_bits": 8}], ["config_list[0]:", "'op_types' or 'op_names'", "{'q_bits': 8}"]),
]

# keys of an entry -> texts that the message has to hold
BAD_ENTRIES = [
    ({"q_bit": 8}, ["[0]['q_bit']", "unknown key", "'q_bits'"]),
    ({"op_type": "Dense"}, ["[0]['op_type']", "'op_types'"]),
    ({3: 8}, ["[0][3]", "unknown key"]),
    ({"op_types": []}, ["['op_types']", "at least one name", "[]"]),
    ({"op_types": None}, ["['op_types']", "None"]),
    ({"op_types": ["default", 3]}, ["['op_types']", "['default', 3]"]),
    ({"op_names": [""]}, ["['op_names']", "['']"]),
    ({"q_bits": 9}, ["['q_bits']", "9", "2, 3, 4, 5, 6, 7, 8 or 32"]),
    ({"q_bits": True}, ["['q_bits']", "True"]),
    ({"q_bits": 8.0}, ["['q_bits']", "8.0"]),
    ({"q_bits": "8"}, ["['q_bits']", "'8'"]),
    ({"q_bits": None}, ["['q_bits']", "None"]),
    ({"q_bits": {}}, ["['q_bits']", "{}"]),
    ({"q_bits": 1}, ["['q_bits']", "weight", '"dorefa"']),
    ({"q_bits": 16}, ["['q_bits']", '{"weight": 8, "output": 16}']),
    ({"q_bits": {"weights": 8}}, ["['q_bits']", "'weights'", "Did you mean 'weight'"]),
    ({"q_bits": {"gradient": 4}}, ["['q_bits']['gradient']", "dorefa"]),
    ({"q_bits": {"gradient": 4}, "quantizer": "naive"}, ["['q_bits']['gradient']", "dorefa"]),
    ({"quant_bits": {"weight": 0}}, ["['quant_bits']['weight']", "0"]),
    ({"q_bits": 4, "quant_bits": 8}, ["'q_bits'", "'quant_bits'", "4", "8"]),
    ({"q_bits": 4, "quant_bits": {"output": 8}}, ["'q_bits'", "'quant_bits'", "'output'"]),
    ({"q_bits": {"output": 4}, "quant_types": ["weight"]}, ["'q_bits'", "'quant_types'", "'output'"]),
    ({"quantizer": "QAT"}, ["['quantizer']", "'QAT'", "Did you mean 'qat'"]),
    ({"quantizer": None}, ["['quantizer']", "None"]),
    ({"quant_types": ["weights"]}, ["['quant_types']", "'weights'", "'weight'"]),
    ({"quant_types": []}, ["['quant_types']", "[]"]),
    ({"quant_types": ["gradient"]}, ["['quant_types']", "q_bits"]),
    ({"quant_scheme": "tensor_affine"}, ["['quant_scheme']", "symmetric weights", "'tensor_affine'"]),
    ({"quant_scheme": {"weight": "channel_affine"}}, ["['quant_scheme']['weight']", "'channel_affine'"]),
    ({"quant_scheme": "channel_symmetric"}, ["['quant_scheme']", "output", "'channel_symmetric'"]),
    ({"quant_scheme": {"output": "per_channel_affine"}}, ["['quant_scheme']['output']", "'per_channel_affine'"]),
    ({"quant_scheme": {"output": "tensor_afine"}}, ["['quant_scheme']['output']", "Did you mean 'tensor_affine'"]),
    ({"quant_scheme": {"input": "tensor_affine"}}, ["['quant_scheme']", "'input'", "'quant_types'"]),
    ({"quant_scheme": {"output": 3}}, ["['quant_scheme']['output']", "3"]),
    ({"q_bits": {"output": 1}, "quant_scheme": {"output": "tensor_symmetric"}}, ["['quant_scheme']", "one-bit"]),
    ({"quantizer": "dorefa", "quant_scheme": {"weight": "channel_symmetric"}}, ["['quant_scheme']", "'dorefa'"]),
    ({"quant_dtype": "uint"}, ["['quant_dtype']", "signed weights", "'uint'"]),
    ({"quant_dtype": {"output": "float"}}, ["['quant_dtype']['output']", "'float'"]),
    ({"quant_start_step": -1}, ["['quant_start_step']", "-1"]),
    ({"quant_start_step": 1.5}, ["['quant_start_step']", "1.5"]),
    ({"quant_start_step": False}, ["['quant_start_step']", "False"]),
    ({"exclude": 1}, ["['exclude']", "True or False"]),
    ({"exclude": True, "q_bits": 8}, ["['exclude']", "'q_bits'"]),
    ({"exclude": True, "quant_types": ["weight"]}, ["['exclude']", "'quant_types'"]),
]
CASES = [*BAD_LISTS, *(([{**ANY, **keys}], ["config_list[0]", *texts]) for keys, texts in BAD_ENTRIES)]


@pytest.mark.parametrize(("config_list", "texts"), CASES, ids=[str(c) for c, _ in CASES])
def test_errors_name_the_place_and_the_way_out(config_list, texts):
    with pytest.raises(ConfigError) as caught:
        parse(config_list)
    for text in (*texts, "Received: "):
        assert text in str(caught.value)


# op_types, op_names, (names, type_name, is_default) -> does it match
MATCHES = [
    ("default", None, (["x"], "Conv2D", True), True),
    ("default", None, (["x"], "Conv2D", False), False),
    ("default", None, (["x"], "default", False), False),
    (["default", "Lambda"], None, (["x"], "Lambda", False), True),
    ("Conv2D", None, (["x"], "Conv2D", False), True),
    ("Conv2D", None, (["x"], "Conv2DTranspose", True), False),
    ("Conv*", None, (["x"], "Conv2D", True), False),
    (None, "conv1", (["conv1"], "Conv2D", True), True),
    (None, "conv1", (["Conv1"], "Conv2D", True), False),
    (None, "conv1", (["conv10"], "Conv2D", True), False),
    (None, "conv?", (["conv1"], "Conv2D", True), True),
    (None, "conv1", (["backbone/conv1"], "Conv2D", True), False),
    (None, "conv1", (["backbone/conv1", "conv1"], "Conv2D", True), True),
    (None, "backbone/*", (["backbone/conv1", "conv1"], "Conv2D", True), True),
    (None, "block[0]", (["block[0]"], "Conv2D", True), True),
    (None, "block[01]", (["block1"], "Conv2D", True), True),
    (None, "conv1", ("conv1", "Conv2D", True), True),
    ("Conv2D", "a*", (["a1"], "Conv2D", True), True),
    ("Conv2D", "a*", (["a1"], "Dense", True), False),
    ("Conv2D", "a*", (["b1"], "Conv2D", True), False),
]


@pytest.mark.parametrize(("op_types", "op_names", "op", "expected"), MATCHES)
def test_selectors(op_types, op_names, op, expected):
    keys = {"op_types": op_types, "op_names": op_names}
    (entry,) = parse([{k: v for k, v in keys.items() if v is not None}])
    assert entry.matches(*op) is expected


OPS = [
    Candidate("op0", ("net/conv1", "conv1"), "Conv2D", True),
    Candidate("op1", ("net/relu", "relu"), "ReLU", True),
    Candidate("op2", ("net/odd", "odd"), "Lambda", False),
    Candidate("op3", ("head",), "Dense", True),
]


def test_the_last_matching_entry_wins_whole():
    entries = parse(
        [
            {"op_types": ["default"], "q_bits": {"weight": 4, "output": 6, "input": 8}, "quant_start_step": 5},
            {"op_types": ["Conv2D", "Dense"], "q_bits": {"weight": 2}},
            {"op_names": ["net/*"], "op_types": ["Conv2D"], "exclude": True},
        ]
    )
    found = match(entries, iter(OPS))
    assert found == {"op0": entries[2], "op1": entries[0], "op2": None, "op3": entries[1]}
    assert bits_of(found["op3"]) == (2, 8, None, None) and found["op3"].start_step == 0


def test_default_beside_a_name_need_not_match():
    entries = parse([{"op_types": ["default", "Lambda"]}])
    assert match(entries, OPS[2:3]) == {"op2": entries[0]}


# entry -> texts that the message has to hold
UNMATCHED = [
    ({"op_types": ["default", "Conv2d"]}, ["[1]['op_types']", "'Conv2d', did you mean 'Conv2D'"]),
    ({"op_types": "defualt"}, ["[1]['op_types']", "did you mean 'default'"]),
    ({"op_names": ["head", "convl", "tail*"]}, ["[1]['op_names']", "'convl'", "'tail*'", "'conv1'"]),
    ({"op_types": ["Conv2d"], "op_names": ["haed"]}, ["'Conv2d'", "'Conv2D'", "'haed'", "'head'"]),
    ({"op_types": ["Conv2D"], "op_names": ["head"]}, ["[1]['op_types']", "both", "'head' (Dense)"]),
    ({"op_types": ["default"], "op_names": ["odd"]}, ["[1]['op_types']", "both", "'net/odd' (Lambda)"]),
]


@pytest.mark.parametrize(("entry", "texts"), UNMATCHED, ids=[str(e) for e, _ in UNMATCHED])
def test_an_entry_that_matches_nothing_is_an_error(entry, texts):
    with pytest.raises(ConfigError) as caught:
        match(parse([ANY, entry]), OPS)
    for text in ("config_list[1]", *texts):
        assert text in str(caught.value)


def test_default_that_selects_no_op_is_an_error():
    with pytest.raises(ConfigError, match=r"config_list\[0\]\['op_types'\].*'default'.*Lambda"):
        match(parse(None), OPS[2:3])


def test_an_entry_says_which_spelling_of_the_bits_it_had():
    assert only(quant_bits=4).where(only(quant_bits=4).bits_key) == "config_list[0]['quant_bits']"
    assert only(quant_bits=4) == only(q_bits=4)
