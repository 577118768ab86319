"""The Keras 3 front end: `read` a model, `attach` a plan to it."""

from kquant.keras3.attach import attach
from kquant.keras3.controlled import controlled
from kquant.keras3.precision import as_float32, take_state
from kquant.keras3.read import read

__all__ = ["as_float32", "attach", "controlled", "read", "take_state"]
