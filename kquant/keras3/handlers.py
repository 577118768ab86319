"""The table of handlers: how each layer class is read. `read_linear` and `read_layers` fill it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kquant.core.graph import Weight
from kquant.keras3.read import Reader

Handler = Callable[[Reader, Any, list[str], Any], list[str]]
LAYERS: dict[type, Handler] = {}


def reads(*classes: type) -> Callable[[Handler], Handler]:
    """Enter a handler for some layer classes."""

    def enter(handler: Handler) -> Handler:
        LAYERS.update(dict.fromkeys(classes, handler))
        return handler

    return enter


def weight(variable: Any) -> Weight:
    """A weight that follows a Keras variable."""
    return Weight(tuple(variable.shape), lambda: np.asarray(variable, np.float32))
