"""What the controls act on in a quantized graph."""

from __future__ import annotations

from typing import Any

from kquant.controls import Controlled


def controlled(value: Any) -> Controlled | None:
    """The moving ranges and the batch norms of a graph; None without a quantizer."""
    raise NotImplementedError
