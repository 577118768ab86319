"""Activity regularizers, which a layer made of several ops would lose: their loss becomes a layer of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from kquant.keras_common.generation import Source
from kquant.keras_common.handlers import reads_own

if TYPE_CHECKING:
    from kquant.core.graph import Op
    from kquant.keras_common.generation import Call
    from kquant.keras_common.reader import Reader

NAMES = ("ActivityRegularization", "ActivityRegularizer")  # layers that are no more than this loss


class ActivityRegularizerBase:
    """Hands on its input, and adds to the loss what a regularizer says of it.

    Args:
        regularizer: as Keras takes it: a function of the tensor, a regularizer or its config.
    """

    keras: ClassVar[Any]

    def __init__(self, regularizer: Any, **kwargs: Any):
        super().__init__(activity_regularizer=self.keras.regularizers.get(regularizer), **kwargs)
        self.supports_masking = True

    def call(self, x: Any) -> Any:
        return x

    def get_config(self) -> dict:
        base = {k: v for k, v in super().get_config().items() if k != "activity_regularizer"}
        return {**base, "regularizer": self.keras.regularizers.serialize(self.activity_regularizer)}


@reads_own("ActivityRegularizer")
def read_regularizer(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """It is nothing in the artifact."""
    return r.add("identity", layer, inputs, [call.shape], r.again(layer, call), call=unchanged)


def regularized(r: Reader, layer: Any, tensors: list[str], ops: list[Op]) -> list[str]:
    """The outputs of a layer that was read as `ops`, behind the loss of its activity regularizer, if it has one."""
    regularizer = getattr(layer, "activity_regularizer", None)
    if regularizer is None or any(op.type_name in NAMES for op in ops):
        return tensors
    name = f"{layer.name}_activity_regularizer"

    def build() -> Any:
        return r.own.ActivityRegularizer(regularizer, name=name, dtype=layer.dtype_policy)

    source = Source((id(layer), "activity"), build, None, lambda new, values: new(values[0]), name)
    own = build()
    return [r.add("identity", own, [t], [r.shape(t)], source, call=unchanged)[0] for t in tensors]


def unchanged(values: Any, float_weights: bool = False) -> list[Any]:
    """What an identity op computes in inference; augmentation layers called alone would augment."""
    return [values[0]]
