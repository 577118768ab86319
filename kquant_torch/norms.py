"""Batch norm that can be frozen."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

from kquant_torch.state import Stateful


def batch_affine(module: nn.Module, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset per channel of a batch norm with these statistics, float64."""
    weight, bias = (None if p is None else p.detach().cpu().double().numpy() for p in (module.weight, module.bias))
    scale = (1.0 if weight is None else weight) / np.sqrt(variance + module.eps)
    return scale, (0.0 if bias is None else bias) - mean * scale


class FreezableNorm(Stateful):
    """A batch norm whose statistics can stand still in training. Mixed in before its class.

    While `frozen`, training normalizes by the running statistics, as evaluation does, and leaves them as they are.
    """

    frozen: bool

    def _own_state(self) -> list[str]:
        return ["frozen"]

    def set_frozen(self, value: float) -> None:
        """Let the statistics stand still (1) or move (0)."""
        self.frozen = bool(value)

    @torch.no_grad()
    def set_statistics(self, mean: np.ndarray, variance: np.ndarray) -> None:
        """Set the running statistics, one value per channel."""
        self.running_mean.copy_(torch.as_tensor(mean))
        self.running_var.copy_(torch.as_tensor(variance))

    @torch.no_grad()
    def gain(self) -> torch.Tensor:
        """`|gamma / sigma|` with the running statistics, one float32 value per channel."""
        root = torch.rsqrt(self.running_var.float() + self.eps)
        return root if self.weight is None else self.weight.float().abs() * root

    def affine_of(self, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale and offset per channel with these statistics, float64."""
        return batch_affine(self, mean, variance)


class FreezableBatchNorm(FreezableNorm):
    """Torch's own layers as such."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Torch's function, with the running statistics if they are frozen."""
        if not (self.frozen and self.training):
            return super().forward(x)
        self._check_input_dim(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class _OwnForward(FreezableNorm):
    """A batch norm of the user's, whose forward does more: the model's code calls `functions.norm_of` for it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self).float_class,), self.__getstate__()


@functools.cache
def freezable(cls: type) -> type:
    """The subclass of a user's batch norm whose statistics can stand still."""
    body = {"float_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"Quantized{cls.__name__}", (_OwnForward, cls), body)


def _empty(cls: type) -> Any:
    made = freezable(cls)
    return made.__new__(made)


class QuantizedBatchNorm1d(FreezableBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that can be frozen."""


class QuantizedBatchNorm2d(FreezableBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that can be frozen."""


class QuantizedBatchNorm3d(FreezableBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that can be frozen."""


BATCH_NORMS: dict[type, type] = {
    nn.BatchNorm1d: QuantizedBatchNorm1d,
    nn.BatchNorm2d: QuantizedBatchNorm2d,
    nn.BatchNorm3d: QuantizedBatchNorm3d,
}
