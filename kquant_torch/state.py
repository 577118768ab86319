"""State of our modules that a float checkpoint does not have, and flags that are saved with a quantized one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Stateful(nn.Module):
    """A module whose own buffers may be missing from a checkpoint, and whose flags (`FLAGS`) are saved with it.

    A float checkpoint has none of the state that quantization adds; loading it with `strict=True` leaves that state as
    it is. A checkpoint that has some of it must have all of it. Flags are plain attributes, so compiled code is
    specialized to them, and lie in the `state_dict` as tensors.
    """

    FLAGS: tuple[str, ...] = ("frozen",)

    def _own_state(self) -> list[str]:
        """Names of the state that quantization added to this module."""
        return [*(n for n in self._buffers if n not in self._non_persistent_buffers_set), *self._own_flags()]

    def _own_flags(self) -> list[str]:
        return [f for f in self.FLAGS if f in self.__dict__]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for flag in self._own_flags():
            destination[prefix + flag] = torch.tensor(bool(getattr(self, flag)))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        own = [prefix + name for name in self._own_state()]
        is_float = not any(name in state_dict for name in own)
        before, surplus = len(missing), len(unexpected)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        flags = self._own_flags()
        for flag in flags:
            if prefix + flag in state_dict:
                setattr(self, flag, bool(state_dict[prefix + flag]))
            elif not is_float:
                missing.append(prefix + flag)
        if is_float:
            missing[before:] = [name for name in missing[before:] if name not in own]
        unexpected[surplus:] = [n for n in unexpected[surplus:] if n not in {prefix + f for f in flags}]
