"""The public entry points: `quantize_model`, `plan`, and the three quantizers in their classic form."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from kquant.core.calibration import calibrate
from kquant.core.config import Candidate, Entry, match, parse
from kquant.core.errors import ConfigError, ModelError, check_choice
from kquant.core.graph import Graph
from kquant.core.observers import CHOICES
from kquant.core.placement import place
from kquant.core.plan import Plan
from kquant.core.ready import check_quantizes

TARGETS = ("tflite",)


# The package in which a model's class, or one of its bases, is defined, and our front end for it. The first that is
# found counts: Keras models of both generations also have bases from TensorFlow. Graphs and sessions are TensorFlow's
# own; a graph with its inputs and outputs selected is ours.
FRONT_ENDS = {
    "keras": "kquant.keras3",
    "tf_keras": "kquant.keras2",
    "kquant": "kquant.tf1",
    "tensorflow": "kquant.tf1",
}
ELSEWHERE = {"torch": "a PyTorch module; kquant_torch is for these"}


def front_end(model: Any) -> Any:
    """The front end module for a model.

    It offers

    - `read(model)`: the neutral graph;
    - `attach(plan, model)`: the trainable quantized model;
    - `as_float32(model)`: the model itself, or a float32 copy of one that computes in less;
    - `take_state(model, exact)`: copy back what calibration set in that copy;
    - `controlled(model)`: a `kquant.core.controls.Controlled`, or None for a float model;
    - `confirm(model, graph)`, where ops are more than those of the model itself: refuse a graph that computes something
      else;

    and where a model is part of something larger that is changed in place, as in a graph,

    - `select(model, **which)`: the part that is meant (see `selected`);
    - `check(model)`: refuse one that cannot be changed;
    - `prepare(model, graph, data)`: refuse what would fail in calibration before anything is changed; gives the data;
    - `deliver(model)`: what the caller gets of the quantized model.

    Raises:
        ModelError: not a model that kquant reads, saying which kind it is.
    """
    roots = {c.__module__.split(".")[0] for c in type(model).__mro__}
    for root, module in FRONT_ENDS.items():
        if root in roots:
            return importlib.import_module(module)
    what = next((text for root, text in ELSEWHERE.items() if root in roots), type(model).__name__)
    raise ModelError(
        "model",
        "a built Keras 3 or tf_keras model, a tf.Graph or a session on one",
        what,
        "Hand in the model itself; a layer or a function is put in a model first",
    )


def selected(model: Any, **which: Any) -> Any:
    """The part of a TensorFlow 1 graph or session that is meant; a Keras model, which is whole, with nothing given.

    Args:
        model: what a front end reads.
        which: `inputs`, `outputs`, `training`, `session`; what is None is not given.

    Raises:
        ConfigError: something is given for a model that is whole. ModelError: a tensor that is not in the graph.
    """
    given = {name: value for name, value in which.items() if value is not None}
    if not given:
        return model
    front = front_end(model)
    if not hasattr(front, "select"):
        raise ConfigError(
            ", ".join(f"{name}=" for name in given),
            "arguments for TensorFlow 1 graphs only",
            type(model).__name__,
            "Leave them out, or hand in a graph or a session",
        )
    return front.select(model, **given)


def as_named(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """The part of a graph that an artifact with these input and output names was made of; other models are whole."""
    is_part = hasattr(front_end(model), "select")
    return selected(model, inputs=inputs, outputs=outputs) if is_part else model


def _entries(graph: Graph, config_list: Any, quantizer: str | None) -> dict[str, Entry | None]:
    # A model input takes part only by its name: it is 8 bits unless an entry names it.
    candidates = [Candidate(f"input:{name}", (name,), "InputLayer", False) for name in graph.inputs]
    candidates += [Candidate(op.id, op.attrs.get("aliases", (op.layer,)), op.type_name, True) for op in graph.ops]
    return match(parse(config_list, quantizer=quantizer), candidates)


def plan(
    model: Any,
    config_list: Any = None,
    *,
    quantizer: str | None = None,
    target: str = "tflite",
    inputs: Any = None,
    outputs: Any = None,
) -> Plan:
    """What `quantize_model` would do, before anything happens.

    Args:
        model: a built Keras 3 or tf_keras model, or a TensorFlow 1 graph.
        config_list: see the README; None is 8 bits everywhere.
        quantizer: the quantizer that the entries imply, or None.
        target: `"tflite"`.
        inputs, outputs: of a TensorFlow 1 graph, as in `quantize_model`.

    Returns:
        A `Plan`; print it for a table, or call `to_dict()`.

    Raises:
        ConfigError: a bad entry of `config_list`. ModelError: the model cannot be read.
        UnsupportedError: an entry matches a layer that has no integer form.

    Example:
        >>> import keras, kquant
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2, name="logits")])
        >>> [(row.layer, row.weight, row.output) for row in kquant.plan(model).rows]
        [('logits', 'qat 8 bit', '8 bit observed')]
    """
    check_choice("target", target, TARGETS)
    graph = front_end(model).read(selected(model, inputs=inputs, outputs=outputs))
    return place(graph, _entries(graph, config_list, quantizer))


def quantize_model(
    model: Any,
    config_list: Any = None,
    *,
    calibration_data: Any = None,
    observer: str = "auto",
    target: str = "tflite",
    training: bool | None = None,
    session: Any = None,
    inputs: Any = None,
    outputs: Any = None,
) -> Any:
    """Quantize a float model for training.

    Args:
        model: a built Keras 3 or tf_keras model, which is not changed; or a `tf.Graph`, which is rewritten in place.
        config_list: which layers are quantized how; None is `[{"q_bits": 8, "op_types": ["default"]}]`.
        calibration_data: samples (an array) or batches (an iterable). With it the ranges are set before the first step,
            so the untrained model already has post-training-quantization accuracy.
        observer: how calibration picks ranges: `"auto"` (min-max; MSE at 4 bits and less), `"minmax"`, `"percentile"`,
            `"mse"`, `"ema"`.
        target: `"tflite"`.
        training: of a graph, False for its evaluation form, in which ranges stand still; the variables are the same.
        session: on a graph, where its variables have their values, for calibration; the default session if there is
            one. It can be used on with the rewritten graph; other sessions that already ran the graph cannot.
        inputs, outputs: of a graph, the tensors (or names) between which the model lies. Without them: the data that
            reaches ops with weights, and where the ops that the target can run end.

    Returns:
        An ordinary `keras.Model`: compile it, fit it, save it, and hand it to `export_tflite`. For a graph a report of
        what was added to it.

    Raises:
        ConfigError, ModelError, UnsupportedError, CalibrationError: each says where, what was expected and what to do.
    """
    model = selected(model, training=training, session=session, inputs=inputs, outputs=outputs)
    return _quantize(model, config_list, None, calibration_data, observer, target)


def _quantize(
    model: Any, config_list: Any, quantizer: str | None, calibration_data: Any, observer: str, target: str
) -> Any:
    check_choice("observer", observer, CHOICES)
    check_choice("target", target, TARGETS)
    front = front_end(model)
    if hasattr(front, "check"):
        front.check(model)
    graph = front.read(model)
    if any("quantizer" in op.attrs for op in graph.ops):
        raise ModelError(
            f"model {graph.name!r}",
            "a float model",
            "a model that kquant already quantized",
            "Hand in the float model, which quantizing does not change",
        )
    made = place(graph, _entries(graph, config_list, quantizer))
    check_quantizes(made)
    if hasattr(front, "confirm"):
        front.confirm(model, graph)
    if calibration_data is not None and hasattr(front, "prepare"):
        calibration_data = front.prepare(model, graph, calibration_data)
    quantized = front.attach(made, model)
    if calibration_data is not None:
        exact = front.as_float32(quantized)
        calibrate(front.read(exact), calibration_data, observer)
        front.take_state(quantized, exact)
    return front.deliver(quantized) if hasattr(front, "deliver") else quantized


class _Quantizer:
    """The classic form: a quantizer made from a config, then called on a model."""

    kind = ""

    def __init__(self, config_list: Any = None):
        parse(config_list, quantizer=self.kind)
        self.config_list = config_list

    def __call__(
        self,
        model: Any,
        calibration_data: Any = None,
        observer: str = "auto",
        *,
        training: bool | None = None,
        session: Any = None,
        inputs: Any = None,
        outputs: Any = None,
    ) -> Any:
        """The trainable quantized model, or the report on a graph; see `quantize_model`."""
        model = selected(model, training=training, session=session, inputs=inputs, outputs=outputs)
        return _quantize(model, self.config_list, self.kind, calibration_data, observer, "tflite")


class NaiveQuantizer(_Quantizer):
    """Weights by their current max|w| per channel, ranges from calibration or the first training batch."""

    kind = "naive"


class QAT_Quantizer(_Quantizer):
    """Quantization-aware training after Jacob et al. 2018 (arXiv:1712.05877)."""

    kind = "qat"


class DoReFaQuantizer(_Quantizer):
    """DoReFa-Net (Zhou et al. 2016, arXiv:1606.06160): low-bit weights, activations and gradients."""

    kind = "dorefa"
