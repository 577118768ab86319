"""Fake quantization in torch: straight-through functions, and the module that quantizes activations of one range."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from kquant.core.affine import nudged
from kquant.core.moving import EMA_DECAY, kept, moved
from kquant_torch import arrays
from kquant_torch.state import Stateful

CHUNK = 2**18  # values that are worked on at a time: the passes over them then stay in a core's cache

Number = Any  # a float on the eager CPU path, a float32 tensor elsewhere


def grid(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[Number, Number, Number]:
    """Scale, and the first and last step of the grid of a range, counted from zero: `core.affine.nudged`.

    Plain floats where reading a value costs nothing (eager mode on a CPU), else tensors, so that nothing is read.
    """
    levels = 2**bits - 1
    if torch.compiler.is_compiling() or low.device.type != "cpu":
        scale, below = nudged(low, high, bits, arrays)
        return scale, 0.0 - below, levels - below
    scale, below = map(float, nudged(np.float32(low.item()), np.float32(high.item()), bits))
    return scale, 0.0 - below, levels - below


def rounded(x: torch.Tensor, scale: Number, first: Number, last: Number) -> torch.Tensor:
    """`clip(floor(x / scale + 0.5), first, last) * scale` in as few passes over memory as eager mode allows."""
    if isinstance(scale, torch.Tensor):
        return torch.clamp(torch.floor(x * (1.0 / scale) + 0.5), first, last) * scale
    result = torch.empty_like(x)
    half = torch.tensor(0.5)
    inverse = float(np.float32(1.0) / np.float32(scale))
    for part, source in zip(_chunks(result), _chunks(x), strict=True):
        torch.add(half, source, alpha=inverse, out=part)
        part.floor_().clamp_(first, last).mul_(scale)
    return result


def _chunks(x: torch.Tensor) -> list[torch.Tensor]:
    """Pieces of a tensor's memory in order, or the tensor itself where its memory has gaps or another order."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = x.is_contiguous() or (x.ndim in layouts and x.is_contiguous(memory_format=layouts[x.ndim]))
    if not dense or x.numel() <= CHUNK:
        return [x]
    return list(x.as_strided((x.numel(),), (1,)).split(CHUNK))


class _FakeQuantize(torch.autograd.Function):
    """Rounds to the grid of a range; the gradient passes inside the range and is zero outside of it."""

    @staticmethod
    def forward(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
        return rounded(x, *grid(low, high, bits))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        x, low, high, ctx.bits = inputs
        ctx.save_for_backward(x, low, high)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        x, low, high = ctx.saved_tensors
        scale, first, last = grid(low, high, ctx.bits)
        if isinstance(scale, torch.Tensor):
            inside = (x >= first * scale) & (x <= last * scale)
            return torch.where(inside, upstream, torch.zeros_like(upstream)), None, None, None
        # The kernel excludes its limits, and ours belong to the range.
        below = float(np.nextafter(np.float32(first * scale), np.float32(-np.inf)))
        above = float(np.nextafter(np.float32(last * scale), np.float32(np.inf)))
        return torch.ops.aten.hardtanh_backward(upstream, x, below, above), None, None, None


class _StraightThrough(torch.autograd.Function):
    """The dequantized codes of a weight formula, with the gradient passed to the prepared weights unchanged."""

    @staticmethod
    def forward(prepared: torch.Tensor, quantize: Any, gain: Any, training: bool) -> torch.Tensor:
        codes, scale = quantize(prepared, gain, training)
        return codes * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        return upstream, None, None, None


def fake_quantize_range(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Fake-quantize float32 `x` on the range `[low, high]` (float32 scalars), nudged so that zero is exact.

    Rounding is half up, as everywhere in kquant. The gradient is `1` from the lowest to the highest value of the grid
    and `0` outside (Jacob et al. 2018; Bengio et al. 2013, straight-through estimator).

    Example:
        >>> x = torch.tensor([-0.8, 0.26, 0.75, 2.0], requires_grad=True)
        >>> y = fake_quantize_range(x, torch.tensor(0.0), torch.tensor(1.5), 2)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 0.5, 1.0, 1.5], [0.0, 1.0, 1.0, 0.0])
    """
    return _FakeQuantize.apply(x, low, high, bits)


def straight_through(prepared: torch.Tensor, quantize: Any, gain: torch.Tensor | None, training: bool) -> torch.Tensor:
    """The fake-quantized weights of a formula from what its `prepare` returned.

    Args:
        prepared: the weights.
        quantize: (prepared, gain, training) -> codes and scale.
        gain: of the batch norm behind them, or None.
        training: whether this is a training step.
    """
    return _StraightThrough.apply(prepared, quantize, gain, training)


def batch_range(x: torch.Tensor, nonneg: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of a batch, of the batches of all processes where training is distributed."""
    low, high = (torch.zeros((), device=x.device), x.amax()) if nonneg else torch.aminmax(x)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        both = torch.stack([-low, high])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        low, high = -both[0], both[1]
    return low, high


class Delayed(Stateful):
    """A module that begins to quantize after `start_step` forward passes in training.

    The buffer `step` counts calls in training. `calls` is how often a forward pass of the model calls it, so all its
    calls begin in the same pass.
    """

    start_step: int
    calls: int

    def _add_step(self, start_step: int) -> None:
        self.start_step, self.calls = start_step, 1
        if start_step:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def is_waiting(self) -> bool:
        """Whether quantization has not begun yet."""
        return bool(self.start_step) and int(self.step) < self.start_step * self.calls

    def _started(self) -> torch.Tensor | None:
        """Whether quantization has begun, as a tensor, or None without a delay. Counts a call in training."""
        if not self.start_step:
            return None
        started = self.step >= self.start_step * self.calls
        if self.training:
            self.step.add_(1)
        return started


class FakeQuantize(Delayed):
    """Fake quantization of activations that share one range.

    In training each call site keeps its own moving minimum and maximum, and the range is their union, so tensors that
    share a scale (the inputs of a concatenation) are all covered. In evaluation the range stands still. In distributed
    training all processes see the minimum and maximum of the whole batch, so their ranges are equal to the bit.

    Args:
        bits: 1..8.
        sites: number of call sites that observe; a call names its own as `site`, and with `boundary` that its input
            comes from an op that stays float.
        fixed: `(low, high)` of a range that does not move, or None.
        symmetric: zero point 0.
        nonneg: the range starts at zero.
        start_step: quantize from this training pass on; observe before it.
        decay: of the exponential moving average; 1.0 keeps the first range (calibration's, or the first batch's).
    """

    def __init__(
        self,
        bits: int = 8,
        sites: int = 1,
        fixed: tuple[float, float] | None = None,
        symmetric: bool = False,
        nonneg: bool = False,
        start_step: int = 0,
        decay: float = EMA_DECAY,
    ):
        super().__init__()
        self.bits, self.sites, self.symmetric, self.nonneg, self.decay = bits, sites, symmetric, nonneg, decay
        self.fixed = None if fixed is None else (float(fixed[0]), float(fixed[1]))
        self.frozen, self.name = False, ""
        self.watch: Any = None  # in calibration: called with (self, x, site), and its result is passed on
        self.register_buffer("fixed_range", torch.tensor(self.fixed or (0.0, 1.0)), persistent=False)
        if fixed is None:
            self.register_buffer("minimum", torch.zeros(sites))
            self.register_buffer("maximum", torch.zeros(sites))
            # Calibration's ranges may be narrower than the data (MSE at few bits); training keeps to that share.
            self.register_buffer("covered_low", torch.ones(sites))
            self.register_buffer("covered_high", torch.ones(sites))
            self.register_buffer("seen", torch.zeros(sites))  # 0: no range yet, 1: moves with the batches, 2: is held
        self._add_step(start_step)

    def forward(self, x: torch.Tensor, site: int | None = None, boundary: bool = False) -> torch.Tensor:
        """`x`, quantized and dequantized; float32 inside, the dtype of `x` outside."""
        if self.watch is not None:
            return self.watch(self, x, site)
        wide = x.float()
        observes = self.training and self.fixed is None and site is not None
        batch = self._observe(wide.detach(), site) if observes and not self.frozen else None
        quantized = fake_quantize_range(wide, *self.limits(batch), self.bits)
        ready = self._ready()
        if ready is not None:
            quantized = torch.where(ready, quantized, wide)
        return quantized.to(x.dtype) if x.is_floating_point() else quantized

    def _ready(self) -> torch.Tensor | None:
        """Whether quantization is on, as a tensor; None where it always is."""
        started = self._started()
        if self.fixed is not None or self.training:
            return started
        seen = self.seen.amax() > 0
        return seen if started is None else torch.logical_and(started, seen)

    @torch.no_grad()
    def _observe(self, x: torch.Tensor, site: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Take in a training batch; gives what `limits` takes of it, None where the range does not move."""
        low, high = batch_range(x, self.nonneg)
        low = torch.clamp(low, max=0.0) * self.covered_low[site]
        high = torch.clamp(high, min=0.0) * self.covered_high[site]
        seen = self.seen[site]
        for buffer, value in ((self.minimum, low), (self.maximum, high)):
            old = buffer[site]
            after = torch.where(seen == 1, moved(old, value, self.decay), old)
            buffer[site].copy_(torch.where(seen == 0, value, after))
        follows = seen == 1
        self.seen[site].copy_(torch.clamp(seen, min=1.0))
        return (low * follows, high * follows) if self.decay < 1.0 else None

    def limits(self, batch: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The float32 range in force, before nudging; `[0, 1]` for a tensor that is constantly zero.

        Args:
            batch: minimum and maximum of the training batch that is quantized on it.
        """
        if self.fixed is not None:
            return self.fixed_range[0], self.fixed_range[1]
        low = torch.clamp(self.minimum.amin(), max=0.0)
        high = torch.clamp(self.maximum.amax(), min=0.0)
        if batch is not None:
            low, high = kept(low, high, *batch, arrays)
        if self.symmetric:
            high = torch.maximum(-low, high)
            half = 2 ** (self.bits - 1)
            low = -high * (half / (half - 1.0))
        return low, torch.where(high == low, torch.ones_like(high), high)

    def range(self) -> tuple[float, float]:
        """The range in force, before nudging, as numbers that float32 holds."""
        low, high = self.limits()
        return float(low), float(high)

    @property
    def unit(self) -> bool:
        """Whether this is DoReFa's range [0, 1]."""
        return self.fixed == (0.0, 1.0)

    def is_set(self) -> bool:
        """Whether the range has come from data, or is fixed."""
        return self.fixed is not None or bool(self.seen.amax() > 0)

    def set_frozen(self, value: float) -> None:
        """Let the range stand still in training (1) or move (0)."""
        self.frozen = bool(value)

    @torch.no_grad()
    def set_range(
        self, low: float, high: float, site: int, covered: tuple[float, float] = (1.0, 1.0), held: bool = False
    ) -> None:
        """Set a site's range, as calibration does.

        Args:
            low, high: the range.
            site: the call site.
            covered: the shares of the data's minimum and maximum that the range covers, which training keeps to.
            held: training leaves the range as it is.
        """
        values = (low, high, *covered, 2.0 if held else 1.0)
        buffers = (self.minimum, self.maximum, self.covered_low, self.covered_high, self.seen)
        for buffer, value in zip(buffers, values, strict=True):
            buffer[site] = float(value)

    def extra_repr(self) -> str:
        """The settings, for a printed model."""
        kind = f"fixed {self.fixed}" if self.fixed else "symmetric" if self.symmetric else "observed"
        return f"{self.bits} bit {kind}, sites={self.sites}"


def quantizers_of(model: nn.Module) -> list[FakeQuantize]:
    """The activation quantizers of a model, each once."""
    return [m for m in model.modules() if isinstance(m, FakeQuantize)]
