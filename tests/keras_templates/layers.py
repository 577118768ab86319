"""Each snippet through the whole way: quantize with calibration data, export, audit, verify, and run end to end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from keras_generation import keras

import kquant
from keras_templates.snippets import KERNELS, SNIPPETS, TOKENS, Snippet, randomize
from keras_templates.snippets_models import REQUIRED_LAYERS, SUBCLASSED
from kquant.core.int8_spec import ROWS
from kquant.tflite.flatbuffer import decode

DEFAULT = {"op_types": ["default"]}
# name: (config, smallest activation bits)
WIDTHS: dict[str, tuple[list[dict[str, Any]] | None, int]] = {
    "w8a8": (None, 8),
    "naive": ([{**DEFAULT, "q_bits": 8, "quantizer": "naive"}], 8),
    "w4a4": ([{**DEFAULT, "q_bits": 4, "quantizer": "qat"}], 4),
    "dorefa_w2a3": ([{**DEFAULT, "q_bits": {"weight": 2, "output": 3}, "quantizer": "dorefa"}], 3),
}
# 0.5 is perfect rounding and the contract says 0.6; rows with a measured bound of their own, at most 1, carry it. With
# few bits, half a unit of the bias shows in the output; `verify` adds that to the bound, which is still at most 1.
BOUND = {op: row.bound for op, row in ROWS.items()}
# Largest mean distance of an output from the trained model's, in its codes. Values on a rounding boundary (within
# float32's error) differ, here or in a tensor before, and with few codes they come in lumps: many values are the same.
MEAN = {8: 0.1, 4: 1.0, 3: 1.0}


def cases() -> Iterator[Any]:
    for width in WIDTHS:
        # Naive's codes are QAT's; it differs in how ranges come about, so each kind of kernel once will do.
        for name in KERNELS if width == "naive" else [n for n, s in SNIPPETS.items() if s.low_bits or width == "w8a8"]:
            yield pytest.param(width, name, id=f"{width}-{name}")


@pytest.mark.parametrize(("width", "name"), list(cases()))
def test_layer_is_integer_and_as_trained(width: str, name: str, tmp_path) -> None:
    config, bits = WIDTHS[width]
    snippet = SNIPPETS[name]
    check(snippet.model(), snippet, config, bits, tmp_path / "model.tflite")


def check(model: keras.Model, snippet: Snippet, config: Any, bits: int, path: Any) -> None:
    """Assert the contract of an export for one model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DoReFa clips activations")
        qmodel = kquant.quantize_model(model, config, calibration_data=snippet.samples(0))
    kquant.export_tflite(qmodel, path)
    audit = kquant.audit(path)
    assert audit.fully_integer, audit.float_ops
    x = snippet.samples(1)
    parity = kquant.verify(qmodel, path, x)
    assert parity.ok, parity.problems
    for op in parity.ops:
        limit = BOUND.get(op.kind.split(" by ")[-1], 0.6) if bits == 8 else op.bound
        assert op.max_lsb <= limit <= 1, op
    trained = flat(qmodel.predict(x, verbose=0, batch_size=len(x)))
    for mine, theirs, step in zip(flat(kquant.load_artifact(path)(x)), trained, steps(path), strict=True):
        distance = np.abs(mine.astype(np.float64) - theirs) / step
        # A flipped code of a tensor of few bits is as wide as several codes of an 8-bit output.
        assert distance.max() <= snippet.travels * (255 // (2**bits - 1)) + 0.01, snippet.name
        assert distance.mean() <= MEAN[bits], snippet.name


def flat(values: Any) -> list[np.ndarray]:
    """The outputs of a model as a list."""
    return list(values) if isinstance(values, (list, tuple)) else [values]


def steps(path: Any) -> Iterator[float]:
    """The scale of each output's last integer tensor, read from the file."""
    file = decode(path.read_bytes())
    sources = {op.outputs[0]: op.inputs[0] for op in file.ops if op.opcode == "DEQUANTIZE"}
    for output in file.outputs:
        yield float(file.tensors[sources[output]].scale[0])


def test_subclassed_model(tmp_path):
    keras.utils.set_random_seed(1)
    model = SUBCLASSED()
    snippet = SNIPPETS["norm_alone"]
    model(snippet.samples()[:2])
    randomize(model)
    check(model, snippet, None, 8, tmp_path / "model.tflite")


def test_cross_attention(tmp_path):
    """Attention between two inputs, which are calls of one layer on different tensors."""
    q, v = keras.Input(TOKENS, name="q"), keras.Input((5, 12), name="v")
    model = keras.Model([q, v], keras.layers.MultiHeadAttention(2, 4)(q, v))
    rng = np.random.default_rng(0)
    data = {"q": rng.normal(size=(16, *TOKENS)).astype("f4"), "v": rng.normal(size=(16, 5, 12)).astype("f4")}
    qmodel = kquant.quantize_model(model, calibration_data=data)
    kquant.export_tflite(qmodel, tmp_path / "model.tflite")
    assert kquant.verify(qmodel, tmp_path / "model.tflite", data).ok


def test_table_holds_every_required_layer():
    found = set()
    for snippet in SNIPPETS.values():
        model = snippet.model()
        operations = [op for m in [model, *model._flatten_layers()] for op in getattr(m, "operations", [m])]
        found |= {type(op).__name__ for op in operations}
    assert sorted(REQUIRED_LAYERS - found) == []
