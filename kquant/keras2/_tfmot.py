"""tensorflow-model-optimization, imported without changing the process for anybody else.

Importing it sets `TF_USE_LEGACY_KERAS=1`, which also decides what `tf.keras` is from its first use on. Both stay as the
user has them: `tf.keras` is resolved before the import, and the variable is put back after it.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import tensorflow as tf

VARIABLE = "TF_USE_LEGACY_KERAS"


def _import() -> Any:
    before = os.environ.get(VARIABLE)
    _ = tf.keras.layers  # resolves tf.keras as the user's environment has it
    try:
        with warnings.catch_warnings():
            # tfmot 0.8.1 asks distutils for a version when it is imported.
            warnings.filterwarnings("ignore", "distutils Version classes are deprecated", DeprecationWarning)
            from tensorflow_model_optimization.python.core.quantization.keras import (
                quantize_config,
                quantize_layer,
                quantize_registry,
                quantize_scheme,
                quantize_wrapper,
                quantizers,
            )
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
    return quantize_config, quantize_layer, quantize_registry, quantize_scheme, quantize_wrapper, quantizers


_config, _layer, _registry, _scheme, _wrapper, _quantizers = _import()

QuantizeConfig = _config.QuantizeConfig
QuantizeLayer = _layer.QuantizeLayer
QuantizeRegistry = _registry.QuantizeRegistry
QuantizeScheme = _scheme.QuantizeScheme
QuantizeWrapper = _wrapper.QuantizeWrapper
QuantizeWrapperV2 = _wrapper.QuantizeWrapperV2
Quantizer = _quantizers.Quantizer
