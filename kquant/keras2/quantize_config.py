"""tfmot `QuantizeConfig`s of the three recipes: what tfmot's API takes for a layer of its own choice."""

from __future__ import annotations

from typing import Any, ClassVar

import tf_keras

from kquant.core.config import Candidate, match, parse
from kquant.core.errors import ConfigError
from kquant.core.placement import place
from kquant.core.plan import Spec
from kquant.keras2._tfmot import QuantizeConfig
from kquant.keras2.generation import KERAS, call_of
from kquant.keras2.linear import LINEAR
from kquant.keras2.norms import register
from kquant.keras2.quantizers import KernelQuantizer, RangeQuantizer
from kquant.keras_common.attach import range_settings
from kquant.keras_common.reader import read


class RecipeConfig(QuantizeConfig):
    """What the configs of all recipes share; use one of the three.

    Args:
        weight_bits, output_bits: as `q_bits` of `config_list`.
        per_channel: one scale per output channel (naive and qat).
        followed_by_bn: quantize the kernel only. For a layer with a batch norm behind it, whose output has its range
            behind the norm and the activation: give the activation layer a config of its own.
        start_step: quantize from this training step on.
    """

    quantizer: ClassVar[str] = ""
    gradient_bits: int | None = None
    own: ClassVar[tuple[str, ...]] = ("weight_bits", "output_bits", "per_channel", "followed_by_bn", "start_step")

    def __init__(
        self,
        weight_bits: int = 8,
        output_bits: int = 8,
        *,
        per_channel: bool = True,
        followed_by_bn: bool = False,
        start_step: int = 0,
    ):
        self.weight_bits, self.output_bits, self.per_channel = weight_bits, output_bits, per_channel
        self.followed_by_bn, self.start_step = followed_by_bn, start_step
        parse([self.entry()], quantizer=None)

    def entry(self, **selector: Any) -> dict[str, Any]:
        """The same as an entry of `config_list`."""
        bits = {"weight": self.weight_bits, "output": self.output_bits}
        bits |= {} if self.gradient_bits is None else {"gradient": self.gradient_bits}
        scheme = {} if self.per_channel else {"quant_scheme": {"weight": "tensor_symmetric"}}
        entry = {"q_bits": bits, "quantizer": self.quantizer, "quant_start_step": self.start_step, **scheme}
        return {**entry, **(selector or {"op_types": ["default"]})}

    # -- what tfmot's wrapper asks ------------------------------------------------------------------------------------

    def get_weights_and_quantizers(self, layer: Any) -> list:
        self._check(layer)
        rule = LINEAR.get(type(layer))
        if rule is None:
            return []
        axes = rule.axes(layer) if self.per_channel else None
        return [(rule.kernel(layer), KernelQuantizer(self.quantizer, self.weight_bits, axes, self.start_step))]

    def get_activations_and_quantizers(self, layer: Any) -> list:
        return []  # the range is that of the layer's output, behind its activation

    def set_quantize_weights(self, layer: Any, quantize_weights: list) -> None:
        for value in quantize_weights:
            setattr(layer, LINEAR[type(layer)].attribute, value)

    def set_quantize_activations(self, layer: Any, quantize_activations: list) -> None:
        return None  # nothing to set: see above

    def get_output_quantizers(self, layer: Any) -> list:
        spec = None if self.followed_by_bn else _output_spec(layer, self.entry())
        return [] if spec is None else [RangeQuantizer(**range_settings(spec))]

    def get_config(self) -> dict:
        return {name: getattr(self, name) for name in self.own}

    def _check(self, layer: Any) -> None:
        """Refuse what tfmot's own wrapper cannot do as the recipe says."""
        readers = [node.layer for node in layer._outbound_nodes]
        norms = [r.name for r in readers if isinstance(r, tf_keras.layers.BatchNormalization)]
        if norms and type(layer) in LINEAR and not self.followed_by_bn:
            raise ConfigError(
                f"quantize_config of layer {layer.name!r}",
                "followed_by_bn=True, because a range before the batch norm is not the deployed one",
                f"followed_by_bn=False and the batch norm {norms[0]!r} behind it",
                "Pass scheme=kquant.keras2.QuantizeScheme() to quantize_apply, which places everything; or say "
                "followed_by_bn=True here, and give the activation behind the norm a config",
            )
        if self.gradient_bits is not None:
            raise ConfigError(
                f"quantize_config of layer {layer.name!r}",
                "no gradient_bits, because tfmot's wrapper does not reach the output before the bias",
                f"gradient_bits={self.gradient_bits}",
                "Pass scheme=kquant.keras2.QuantizeScheme() to quantize_apply, or use kquant.quantize_model",
            )


@register
class NaiveQuantizeConfig(RecipeConfig):
    """Weights by their current max|w| per channel; the output's range from the first training batch."""

    quantizer = "naive"


@register
class QATQuantizeConfig(RecipeConfig):
    """Quantization-aware training after Jacob et al. 2018 (arXiv:1712.05877).

    Example:
        >>> import tf_keras
        >>> import tensorflow_model_optimization as tfmot
        >>> from tf_keras import layers
        >>> annotate = tfmot.quantization.keras.quantize_annotate_layer
        >>> model = tf_keras.Sequential(
        ...     [
        ...         tf_keras.Input((4,)),
        ...         annotate(layers.Dense(8, activation="relu"), QATQuantizeConfig(weight_bits=4)),
        ...         layers.Dense(2),
        ...     ]
        ... )
        >>> qmodel = tfmot.quantization.keras.quantize_apply(model)
    """

    quantizer = "qat"


@register
class DoReFaQuantizeConfig(RecipeConfig):
    """DoReFa-Net (Zhou et al. 2016, arXiv:1606.06160).

    Args:
        weight_bits, output_bits, more: see `RecipeConfig`.
        gradient_bits: of the gradient of the layer's output before its bias; None for float.
    """

    quantizer = "dorefa"
    own = (*RecipeConfig.own, "gradient_bits")

    def __init__(self, weight_bits: int = 8, output_bits: int = 8, *, gradient_bits: int | None = None, **more: Any):
        self.gradient_bits = gradient_bits
        super().__init__(weight_bits, output_bits, **more)


CONFIGS: dict[str, type] = {c.quantizer: c for c in (NaiveQuantizeConfig, QATQuantizeConfig, DoReFaQuantizeConfig)}


def _output_spec(layer: Any, entry: dict[str, Any]) -> Spec | None:
    """The range that the placement gives a layer's output in the middle of a model, or None where it shares one.

    A batch norm in front stands for whatever computes the input, a dense layer behind for whatever reads the output.
    """
    if layer._inbound_nodes:
        call = call_of(layer._inbound_nodes[0])
        given = [tf_keras.Input(batch_shape=KERAS.shape(t), dtype=t.dtype) for t in call.inputs]
    else:
        call, given = None, [tf_keras.Input(batch_shape=tuple(layer._build_input_shape))]
    inputs = [x if type(layer) in LINEAR else tf_keras.layers.BatchNormalization()(x) for x in given]
    twin = type(layer).from_config(layer.get_config())
    y = twin(inputs[0]) if call is None else call.invoke(twin, inputs)
    reader = tf_keras.layers.Dense(1, name="reader")
    graph = read(KERAS, tf_keras.Model(given, reader(y)))
    entries = match(parse([entry]), [Candidate(op.id, op.attrs["aliases"], op.type_name, True) for op in graph.ops])
    plan = place(graph, {f"input:{name}": None for name in graph.inputs} | entries)
    tensor = next(op.inputs[0] for op in graph.ops if op.layer == "reader")
    sites = plan.sites.get(tensor, ())
    return plan.specs[sites[-1].spec] if sites else None
