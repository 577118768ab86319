"""The tf_keras (Keras 2) front end: `read`, `attach`, and what else `kquant.api.front_end` asks for.

For users of tensorflow-model-optimization (tfmot) it has a `QuantizeConfig` for each recipe and a `QuantizeScheme`.
"""

from functools import partial

import tf_keras  # noqa: F401  before the modules below: its import makes kquant register its layers, which need them

from kquant.keras2.generation import KERAS
from kquant.keras2.quantize_config import DoReFaQuantizeConfig, NaiveQuantizeConfig, QATQuantizeConfig
from kquant.keras2.scheme import QuantizeScheme
from kquant.keras_common.attach import attach as _attach
from kquant.keras_common.controlled import controlled as _controlled
from kquant.keras_common.faithful import confirm as _confirm
from kquant.keras_common.precision import as_float32, take_state
from kquant.keras_common.reader import read as _read

attach, confirm, controlled, read = (partial(f, KERAS) for f in (_attach, _confirm, _controlled, _read))

__all__ = [
    "DoReFaQuantizeConfig",
    "NaiveQuantizeConfig",
    "QATQuantizeConfig",
    "QuantizeScheme",
    "as_float32",
    "attach",
    "confirm",
    "controlled",
    "read",
    "take_state",
]
