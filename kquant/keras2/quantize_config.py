"""tfmot `QuantizeConfig`s of the three recipes."""

from __future__ import annotations

from typing import Any, ClassVar

from kquant.keras2._tfmot import QuantizeConfig
from kquant.keras2.linear import LINEAR
from kquant.keras2.norms import register
from kquant.keras2.quantizers import KernelQuantizer


class _RecipeConfig(QuantizeConfig):
    quantizer: ClassVar[str] = ""
    gradient_bits: int | None = None

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

    def get_weights_and_quantizers(self, layer: Any) -> list:
        rule = LINEAR.get(type(layer))
        if rule is None:
            return []
        axes = rule.axes(layer) if self.per_channel else None
        return [(rule.kernel(layer), KernelQuantizer(self.quantizer, self.weight_bits, axes, self.start_step))]

    def get_activations_and_quantizers(self, layer: Any) -> list:
        return []

    def set_quantize_weights(self, layer: Any, quantize_weights: list) -> None:
        for value in quantize_weights:
            setattr(layer, LINEAR[type(layer)].attribute, value)

    def set_quantize_activations(self, layer: Any, quantize_activations: list) -> None:
        pass

    def get_output_quantizers(self, layer: Any) -> list:
        return []

    def get_config(self) -> dict:
        own = ("weight_bits", "output_bits", "per_channel", "followed_by_bn", "start_step")
        return {name: getattr(self, name) for name in own}


@register
class NaiveQuantizeConfig(_RecipeConfig):
    quantizer = "naive"


@register
class QATQuantizeConfig(_RecipeConfig):
    quantizer = "qat"


@register
class DoReFaQuantizeConfig(_RecipeConfig):
    quantizer = "dorefa"

    def __init__(self, weight_bits: int = 8, output_bits: int = 8, *, gradient_bits: int | None = None, **more: Any):
        super().__init__(weight_bits, output_bits, **more)
        self.gradient_bits = gradient_bits

    def get_config(self) -> dict:
        return {**super().get_config(), "gradient_bits": self.gradient_bits}


CONFIGS: dict[str, type] = {c.quantizer: c for c in (NaiveQuantizeConfig, QATQuantizeConfig, DoReFaQuantizeConfig)}
