"""The tables of handlers: how each layer class is read, by the name that both generations of Keras give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kquant.core.graph import Weight

if TYPE_CHECKING:
    from kquant.keras_common.generation import Call
    from kquant.keras_common.reader import Reader

    Handler = Callable[[Reader, Any, list[str], Call], list[str]]

LAYERS: dict[str, Handler] = {}
OWN: dict[str, Handler] = {}


def reads(*names: str, table: dict[str, Handler] = LAYERS) -> Callable[[Handler], Handler]:
    """Enter a handler for some of Keras' layer classes."""

    def enter(handler: Handler) -> Handler:
        table.update(dict.fromkeys(names, handler))
        return handler

    return enter


def reads_own(*names: str) -> Callable[[Handler], Handler]:
    """Enter a handler for layers of a quantized model."""
    return reads(*names, table=OWN)


def handlers_of(generation: Any) -> dict[type, Handler]:
    """The handlers by class, for the classes that a generation has."""
    from kquant.keras_common import (  # noqa: F401  they enter their handlers
        attention,
        read_composed,
        read_convolutions,
        read_layers,
        read_linear,
        read_patches,
        read_products,
        read_shapes,
    )

    found = {getattr(generation.layers, n): h for n, h in LAYERS.items() if hasattr(generation.layers, n)}
    return found | {getattr(generation.own, n): h for n, h in OWN.items() if hasattr(generation.own, n)}


def weight(variable: Any) -> Weight:
    """A weight that follows a Keras variable."""
    return Weight(tuple(variable.shape), lambda: np.asarray(variable, np.float32))
