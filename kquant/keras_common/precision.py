"""Models of mixed precision, seen in float32."""

from __future__ import annotations

from typing import Any

OTHER = ("float16", "bfloat16", "float64")  # an input of ids has a compute dtype of integers


def as_float32(model: Any) -> Any:
    """The model itself if it computes in float32, else a float32 copy that shares its values at this moment.

    Calibration and verification need the trained op in float32 (the variables are float32 in any case).
    """
    if not any(layer.compute_dtype in OTHER for layer in model._flatten_layers() if layer is not model):
        return model
    config = _without_policy(model.get_config())
    copy = model.__class__.from_config(config)
    copy.set_weights(model.get_weights())
    return copy


def take_state(model: Any, exact: Any) -> None:
    """Copy back what calibration set in the float32 copy of a model."""
    if exact is not model:
        model.set_weights(exact.get_weights())


def _without_policy(config: Any) -> Any:
    """A config with every dtype policy replaced by float32."""
    if isinstance(config, dict):
        if config.get("class_name") in ("DTypePolicy", "Policy") and "config" in config:
            return "float32"
        return {k: _without_policy(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_without_policy(v) for v in config)
    return config
