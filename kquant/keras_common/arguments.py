"""The arguments of an operation, which know who asked for them: one that nobody reads is not read as its default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

USUAL = ("channels_last", "NHWC")  # what an absent data_format stands for
HARMLESS = ("name", "out_type", "validate_indices")  # they change no value


class Arguments(dict[str, Any]):
    """Arguments by name.

    Args:
        values: the arguments of a call.
        defaults: by name, for those that may be left out.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]):
        super().__init__(values)
        self.defaults, self.asked = dict(defaults), set(HARMLESS)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, which counts as read."""
        self.asked.add(name)
        return super().get(name, default)

    def all_read(self) -> None:
        """Nothing is left out: the shape of the result holds what the arguments say."""
        self.asked.update(self)

    def left(self) -> list[str]:
        """Those that nobody asked for, and that are not as by default."""
        unread = {k: v for k, v in self.items() if k in self.defaults and k not in self.asked and v is not None}
        return [k for k, v in unread.items() if not _same(v, self.defaults[k]) and not _is_usual(k, v)]


def _is_usual(name: str, value: Any) -> bool:
    return name == "data_format" and value in USUAL


def _same(value: Any, default: Any) -> bool:
    """Whether a plain value is the default; an array or a tensor is not."""
    return isinstance(value, (bool, int, float, str, tuple, list)) and value == default
