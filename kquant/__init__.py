"""kquant: train a model quantized, ship it in integers, prove that both are the same model.

Importing kquant imports no framework: a public name is loaded when it is first used. If keras is imported, before or
after kquant, the quantized layers are registered with it, so that a saved model loads without `custom_objects`.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from kquant._version import __version__

if TYPE_CHECKING:
    from kquant.api import DoReFaQuantizer, NaiveQuantizer, QAT_Quantizer, plan, quantize_model
    from kquant.controls import (
        freeze_batch_norm,
        freeze_observers,
        reestimate_batch_norm,
        unfreeze_batch_norm,
        unfreeze_observers,
    )
    from kquant.core.errors import (
        ArtifactError,
        CalibrationError,
        ConfigError,
        ExportError,
        KQuantError,
        ModelError,
        RangeError,
        UnsupportedError,
    )
    from kquant.schedule import QuantizationSchedule
    from kquant.tflite.audit import audit
    from kquant.tflite.export import export_tflite
    from kquant.tflite.run import load_artifact
    from kquant.tflite.state import export_state
    from kquant.tflite.verify import verify

# The same names as above, for the run time. A test compares the two.
_PUBLIC = {
    "kquant.api": ("DoReFaQuantizer", "NaiveQuantizer", "QAT_Quantizer", "plan", "quantize_model"),
    "kquant.controls": (
        "freeze_batch_norm",
        "freeze_observers",
        "reestimate_batch_norm",
        "unfreeze_batch_norm",
        "unfreeze_observers",
    ),
    "kquant.core.errors": (
        "ArtifactError",
        "CalibrationError",
        "ConfigError",
        "ExportError",
        "KQuantError",
        "ModelError",
        "RangeError",
        "UnsupportedError",
    ),
    "kquant.schedule": ("QuantizationSchedule",),
    "kquant.tflite.audit": ("audit",),
    "kquant.tflite.export": ("export_tflite",),
    "kquant.tflite.run": ("load_artifact",),
    "kquant.tflite.state": ("export_state",),
    "kquant.tflite.verify": ("verify",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted([*_HOME, "__version__"])

# Importing the module on the right registers our layers with the framework on the left.
_LAYERS = {"keras": "kquant.keras3.layers", "tf_keras": "kquant.keras2.layers"}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_layers(framework: ModuleType) -> None:
    """Import our layers for a framework that has just been imported; what goes wrong must not break that import."""
    layers = _LAYERS[framework.__name__]
    try:
        importlib.import_module(layers)
    except Exception as error:
        warnings.warn(
            f"kquant could not register its layers with {framework.__name__} "
            f"{getattr(framework, '__version__', '(version unknown)')}, so saved quantized models will not load. "
            f"`import {layers}` shows the whole error. Received: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


for _framework in _LAYERS:
    wrapt.register_post_import_hook(_register_layers, _framework)
