"""A tfmot `QuantizeScheme`: `quantize_apply` with kquant's placement."""

from __future__ import annotations

from typing import Any

from kquant.core.errors import ConfigError
from kquant.keras2._tfmot import QuantizeRegistry
from kquant.keras2._tfmot import QuantizeScheme as TfmotScheme
from kquant.keras2.quantize_config import QATQuantizeConfig, RecipeConfig


class QuantizeScheme(TfmotScheme):
    """Places quantizers as `kquant.quantize_model` does, on the layers that tfmot's API annotated.

    An annotated layer without a config follows `default`; one with a config of kquant's follows that; a layer that is
    not annotated is one that no entry of a `config_list` matches: it stays float, unless it only moves or pools what it
    reads, or is a batch norm or an activation function behind an annotated layer. Batch norm needs no `followed_by_bn`
    here.

    Args:
        default: the config of annotated layers that name none; 8-bit `QATQuantizeConfig()` if absent.
        calibration_data, observer: as for `kquant.quantize_model`.

    Example:
        >>> import tf_keras
        >>> import tensorflow_model_optimization as tfmot
        >>> model = tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Dense(2)])
        >>> annotated = tfmot.quantization.keras.quantize_annotate_model(model)
        >>> qmodel = tfmot.quantization.keras.quantize_apply(annotated, scheme=QuantizeScheme())
    """

    def __init__(self, default: RecipeConfig | None = None, calibration_data: Any = None, observer: str = "auto"):
        self.default = default or QATQuantizeConfig()
        self.calibration_data, self.observer = calibration_data, observer

    def get_layout_transformer(self) -> Any:
        return _Transformer(self)

    def get_quantize_registry(self) -> Any:
        return _NothingLeft()


class _Transformer:
    """What tfmot calls to change a model before it wraps layers: here everything is done at this point."""

    def __init__(self, scheme: QuantizeScheme):
        self.scheme = scheme

    def apply(self, model: Any, layer_quantize_map: dict[str, dict]) -> tuple[Any, dict]:
        """The quantized model, and an empty map: no layer is left for tfmot to wrap."""
        from kquant.api import quantize_model

        configs = {n: m.get("quantize_config") or self.scheme.default for n, m in layer_quantize_map.items()}
        inputs = {layer.name for layer in model._input_layers}
        for name, config in configs.items():
            if not isinstance(config, RecipeConfig):
                raise ConfigError(
                    f"quantize_config of layer {name!r}",
                    "one of kquant's configs, because the scheme places every range itself",
                    type(config).__name__,
                    "Use a config of kquant.keras2.quantize_config, or tfmot's own scheme",
                )
        entries = [c.entry(op_names=[n]) for n, c in configs.items() if n not in inputs]
        data, observer = self.scheme.calibration_data, self.scheme.observer
        return quantize_model(model, entries, calibration_data=data, observer=observer), {}


class _NothingLeft(QuantizeRegistry):
    def supports(self, layer: Any) -> bool:
        return False

    def get_quantize_config(self, layer: Any) -> Any:
        raise NotImplementedError("no layer is left for tfmot to wrap")
