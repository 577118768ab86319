"""The Keras 3 front end: `read` a model, `attach` a plan to it, and what else `kquant.api.front_end` asks for."""

from functools import partial

from kquant.keras3.generation import KERAS
from kquant.keras_common.attach import attach as _attach
from kquant.keras_common.controlled import controlled as _controlled
from kquant.keras_common.faithful import confirm as _confirm
from kquant.keras_common.precision import as_float32, take_state
from kquant.keras_common.reader import read as _read

attach, confirm, controlled, read = (partial(f, KERAS) for f in (_attach, _confirm, _controlled, _read))

__all__ = ["as_float32", "attach", "confirm", "controlled", "read", "take_state"]
