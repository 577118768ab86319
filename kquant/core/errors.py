"""The project's errors: each says where, what was expected, what was received and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence


class KQuantError(Exception):
    """Base class of every error that kquant raises on purpose.

    Args:
        where: what the error is about: ``config_list[2]['q_bits']``, ``layer 'conv1'``, a path.
        expected: what would have been accepted there.
        received: what was found instead; left out of the message when None.
        fix: what the user can do about it.
    """

    def __init__(self, where: str, expected: str, received: object = None, fix: str = ""):
        self.where, self.expected, self.received, self.fix = where, expected, received, fix
        parts = [f"{where}: {expected}."]
        if fix:
            parts.append(f"{fix}.")
        if received is not None:
            parts.append(f"Received: {received}")
        super().__init__(" ".join(parts))


class ConfigError(KQuantError, ValueError):
    """A `config_list` that cannot be understood or contradicts itself."""


class UnsupportedError(KQuantError, ValueError):
    """A layer, an op or a combination that has no integer form on the target."""


class ModelError(KQuantError, ValueError):
    """A model that cannot be read: not built, empty, of the wrong kind, or with non-finite weights."""


class CalibrationError(KQuantError, ValueError):
    """Calibration data of the wrong shape, without a batch, or with NaN or infinity."""


class RangeError(KQuantError, ValueError):
    """A tensor whose range leaves what float32 or the integer kernel can hold."""


class ExportError(KQuantError, RuntimeError):
    """An export that would change values, stay float, or cannot be written."""


class ArtifactError(KQuantError, ValueError):
    """A file that is truncated, not an artifact, or not the artifact of this model."""


def check_choice(
    name: str, value: object, choices: Collection[str], error: Callable[..., KQuantError] = ConfigError
) -> None:
    """Refuse an argument that is none of `choices`.

    Raises:
        ConfigError: or another `error`, naming the argument, the choices and the nearest of them.
    """
    if value not in tuple(choices):
        raise error(
            name, f"one of {', '.join(map(repr, choices))}", repr(value), f"Nearest: {nearest(str(value), choices)}"
        )


def some(names: Sequence[str]) -> str:
    """The first of some names, as an error lists them.

    Example:
        >>> some(["a", "b", "c", "d", "e", "f"])
        "'a', 'b', 'c', 'd', 'e' ..."
    """
    return f"{', '.join(map(repr, names[:5]))}{' ...' if len(names) > 5 else ''}"


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The `count` closest spellings of `name` among `known`, quoted, or all of a short list.

    Example:
        >>> nearest("Conv2d", ["Conv2D", "Dense", "ReLU", "Add", "Flatten", "Softmax", "ELU"])
        "'Conv2D'"
    """
    names = sorted(set(known))
    lowered = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)
    picked = [lowered[c] for c in close] or names[:12]
    return ", ".join(repr(n) for n in picked)
