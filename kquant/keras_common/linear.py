"""The layers with a quantizable kernel: how each applies it, and which kernel axes share a scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kquant.core.errors import UnsupportedError


@dataclass(frozen=True)
class Linear:
    """One layer class.

    Args:
        apply: (layer, input, kernel) -> output without bias and activation.
        axes: layer -> the kernel axes that share a scale (all but the output channel's), or None for one scale.
        attribute: the kernel's name on the layer.
        output_shape: (layer, input shape) -> output shape, where the layer's own answer knows less.
        casts: whether the input is cast to the compute dtype (ids of an embedding are not).
    """

    apply: Callable[[Any, Any, Any], Any]
    axes: Callable[[Any], tuple[int, ...] | None]
    attribute: str = "kernel"
    casts: bool = True
    output_shape: Callable[[Any, tuple], tuple] | None = None

    def shape(self, layer: Any, x: tuple) -> tuple:
        """The output shape for an input shape, None for unknown sizes."""
        return self.output_shape(layer, x) if self.output_shape else tuple(layer.compute_output_shape(x))

    def kernel(self, layer: Any) -> Any:
        """The layer's kernel variable."""
        return getattr(layer, self.attribute)

    def bias(self, layer: Any) -> Any:
        """The layer's bias variable, or None."""
        return getattr(layer, "bias", None) if getattr(layer, "use_bias", True) else None


def einsum_axes(layer: Any) -> tuple[int, ...]:
    """Kernel axes whose letter is not in the output of the equation."""
    inputs, output = layer.equation.replace(" ", "").split("->")
    letters = inputs.split(",")[1]
    return tuple(i for i, letter in enumerate(letters) if letter not in output)


def einsum_shape(layer: Any, x: tuple) -> tuple:
    """Sizes that the equation carries over; Keras' own answer has None for axes that are None in `output_shape`."""
    known = tuple(layer.compute_output_shape(x))
    inputs, output = layer.equation.replace(" ", "").split("->")
    if "..." in output:
        return known
    sizes = dict(zip(inputs.split(",")[0], x, strict=True))
    return tuple(sizes.get(c) if n is None else n for c, n in zip(output, known, strict=True))


def linear_of(rules: dict[type, Linear], layer: Any) -> Linear:
    """The rule of a layer's class.

    Raises:
        UnsupportedError: a layer without a quantizable kernel.
    """
    rule = rules.get(type(layer))
    if rule is None:
        known = ", ".join(sorted(c.__name__ for c in rules))
        raise UnsupportedError(
            f"layer {layer.name!r}",
            f"its class must be one of {known}",
            type(layer).__name__,
            "Use one of these classes, or a subclass that calls its call()",
        )
    return rule
