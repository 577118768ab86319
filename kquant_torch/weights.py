"""Quantized weights: the module that quantizes a weight, and the layers whose kernel goes through it.

A layer keeps its class name's parent, its parameters, their names and its hooks: only its class becomes the one below,
and it gets a child `weight_quantizer`.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

from kquant.core.weights import quantize_gradient
from kquant_torch import arrays
from kquant_torch.fake_quantize import Delayed, straight_through


class WeightQuantizer(Delayed):
    """Quantizes one weight each time it is used; the float parameter stays what is trained.

    Args:
        formula: of `kquant.core.weights`.
        view: the shape in which the formula's axes count, where it is not the parameter's own.
        gradient_bits: DoReFa's gradient quantization of the layer's output before its bias, or None.
        start_step: use the float weight before this training pass.
        name: of the layer; it seeds the noise of the gradients.
        norm: the batch norm behind the layer, where one scale is to hold both, and the shape in which its channels
            broadcast against the weight in `view`'s shape. It stays the model's: it is no child of this module.
    """

    def __init__(
        self,
        formula: Any,
        view: tuple[int, ...] | None = None,
        gradient_bits: int | None = None,
        start_step: int = 0,
        name: str = "",
        norm: tuple[Any, tuple[int, ...]] | None = None,
    ):
        super().__init__()
        self.norm = norm
        self.formula, self.view, self.gradient_bits = formula, view, gradient_bits
        self.seed = zlib.crc32(name.encode())
        self._add_step(start_step)
        if gradient_bits:
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The fake-quantized weight, float32, differentiable with respect to the float one."""
        wide = weight.float()
        shaped = wide if self.view is None else wide.reshape(self.view)
        prepared = self.formula.prepare(shaped, arrays)
        quantized = straight_through(prepared, self._quantize, self._gain(), self.training).reshape(weight.shape)
        started = self._started()
        return quantized if started is None else torch.where(started, quantized, wide)

    @torch.no_grad()
    def codes(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Integer-valued float codes (in `view`'s shape) and their broadcastable scale, from a float weight."""
        wide = weight.float()
        shaped = wide if self.view is None else wide.reshape(self.view)
        return self._quantize(self.formula.prepare(shaped, arrays), self._gain(), False)

    def _gain(self) -> torch.Tensor | None:
        """`|gamma / sigma|` of the norm with its running statistics, as it broadcasts against the weight."""
        return None if self.norm is None else self.norm[0].gain().reshape(self.norm[1])

    def _quantize(self, prepared: torch.Tensor, *gain: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self.formula.quantize(prepared, arrays) if gain[0] is None else self.formula.fold(prepared, *gain, arrays)
        )

    def on_gradient(self, y: torch.Tensor) -> torch.Tensor:
        """`y` itself; in training its gradient is quantized, with noise that counts on from step to step."""
        if not (self.gradient_bits and self.training):
            return y
        self.draws.add_(1)
        started = self.step > self.start_step * self.calls if self.start_step else None
        return _QuantizeGradient.apply(y, self.draws.clone(), self.seed, self.gradient_bits, started)

    def extra_repr(self) -> str:
        """The settings, for a printed model."""
        return f"{self.formula}" + (f", gradient_bits={self.gradient_bits}" if self.gradient_bits else "")


class _QuantizeGradient(torch.autograd.Function):
    """Identity whose gradient is quantized as DoReFa-Net quantizes it (Zhou et al. 2016, equation 12)."""

    @staticmethod
    def forward(y: torch.Tensor, draw: torch.Tensor, seed: int, bits: int, started: Any) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        _, draw, ctx.seed, ctx.bits, started = inputs
        ctx.save_for_backward(draw, started)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        draw, started = ctx.saved_tensors
        noise = uniform_noise(upstream, ctx.seed, draw)
        quantized = quantize_gradient(upstream.float(), noise, ctx.bits, arrays).to(upstream.dtype)
        result = quantized if started is None else torch.where(started, quantized, upstream)
        return result, None, None, None, None


def uniform_noise(like: torch.Tensor, seed: int, draw: torch.Tensor) -> torch.Tensor:
    """Noise in [-0.5, 0.5), in the shape of `like`: a hash of (seed, draw, position), so a step can be repeated.

    The hash is the finalizer of MurmurHash3 (Appleby, public domain), in int32, whose products wrap around.
    """
    start = _mixed(draw.to(torch.int32) * _signed(0x9E3779B1) + _signed(seed))
    position = torch.arange(like.numel(), device=like.device, dtype=torch.int32)
    bits = _mixed(position.mul_(_signed(0x85EBCA77)).add_(start))
    return bits.to(torch.float32).mul_(2.0**-32).clamp_(max=0.49999997).reshape(like.shape)


def _signed(x: int) -> int:
    """A 32-bit number as int32 holds it."""
    return x - 2**32 if x >= 2**31 else x


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """The finalizer, in place; shifts keep the sign, which the masks take away."""
    x = x.bitwise_xor_((x >> 16) & 0xFFFF).mul_(_signed(0x85EBCA6B))
    x = x.bitwise_xor_((x >> 13) & 0x7FFFF).mul_(_signed(0xC2B2AE35))
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


class QuantizedLayer:
    """What the quantized layers share: `run` with the quantized or the float kernel. Mixed in before torch's class."""

    weight: nn.Parameter
    weight_quantizer: WeightQuantizer

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        """The layer on its quantized kernel."""
        return self.run(x, *rest, quantized=True)

    def run(self, x: torch.Tensor, *rest: Any, quantized: bool) -> torch.Tensor:
        """The layer on its quantized or its float kernel."""
        weight = self.weight_quantizer(self.weight) if quantized else self.weight
        bias = getattr(self, "bias", None)
        if self.weight_quantizer.gradient_bits is None or bias is None:
            return self.weight_quantizer.on_gradient(self.apply_kernel(x, weight, bias, *rest))
        y = self.weight_quantizer.on_gradient(self.apply_kernel(x, weight, None, *rest))
        shape = [1] * y.ndim
        shape[self.channel_axis(y.ndim)] = -1
        return y + bias.reshape(shape).to(y.dtype)

    def channel_axis(self, rank: int) -> int:
        """The axis of the output along which the bias lies."""
        return 1

    def apply_kernel(self, x: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any) -> torch.Tensor:
        """The layer's function of input, kernel and bias."""
        return self._conv_forward(x, weight, bias)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """`nn.Conv1d` on quantized weights."""


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d` on quantized weights."""


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """`nn.Conv3d` on quantized weights."""


class _Transposed(QuantizedLayer):
    FUNCTION: Any

    def apply_kernel(self, x: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any) -> torch.Tensor:
        """The transposed convolution; `rest` may hold the wanted output size."""
        rank = len(self.kernel_size)
        output_padding = self._output_padding(
            x, rest[0] if rest else None, self.stride, self.padding, self.kernel_size, rank, self.dilation
        )
        function = type(self).FUNCTION
        return function(x, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation)


class QuantizedConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` on quantized weights."""

    FUNCTION = staticmethod(F.conv_transpose1d)


class QuantizedConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on quantized weights."""

    FUNCTION = staticmethod(F.conv_transpose2d)


class QuantizedConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` on quantized weights."""

    FUNCTION = staticmethod(F.conv_transpose3d)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` on quantized weights."""

    def channel_axis(self, rank: int) -> int:
        """The last axis."""
        return rank - 1

    def apply_kernel(self, x: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any) -> torch.Tensor:
        """`x @ weight.T + bias`."""
        return F.linear(x, weight, bias)


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """`nn.Embedding` on a quantized table."""

    def apply_kernel(self, x: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any) -> torch.Tensor:
        """Rows of the table."""
        return F.embedding(x, weight, self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse)


class QuantizedPReLU(QuantizedLayer, nn.PReLU):
    """`nn.PReLU` on quantized slopes."""

    def apply_kernel(self, x: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any) -> torch.Tensor:
        """`max(x, 0) + weight * min(x, 0)`."""
        return F.prelu(x, weight)


class _Recurrent:
    """LSTM and GRU with every weight matrix quantized; the arithmetic of the cell stays float."""

    def forward(self, x: torch.Tensor, state: Any = None) -> Any:
        """The layer on its quantized matrices."""
        return self.run(x, state, quantized=True)

    def run(self, x: torch.Tensor, state: Any = None, *, quantized: bool) -> Any:
        """The layer on its quantized or its float matrices."""
        names = list(self._flat_weights_names)
        weights = [getattr(self, n) for n in names]
        if quantized:
            weights = [
                self.weight_quantizers[n](w) if n in self.weight_quantizers else w
                for n, w in zip(names, weights, strict=True)
            ]
        batched = x.ndim == 3
        x = x if batched else x.unsqueeze(0 if self.batch_first else 1)
        state = self._state(x, state, batched)
        first = state if self.mode == "LSTM" else state[0]
        y, *last = type(self).KERNEL(
            x, first, weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            self.batch_first,
        )  # fmt: skip
        if not batched:
            y, last = y.squeeze(0 if self.batch_first else 1), [s.squeeze(1) for s in last]
        return y, tuple(last) if self.mode == "LSTM" else last[0]

    def _state(self, x: torch.Tensor, state: Any, batched: bool) -> tuple[torch.Tensor, ...]:
        if state is not None:
            given = state if isinstance(state, (tuple, list)) else (state,)
            return tuple(s if batched else s.unsqueeze(1) for s in given)
        layers = self.num_layers * (2 if self.bidirectional else 1)
        batch = x.shape[0 if self.batch_first else 1]
        hidden = torch.zeros(layers, batch, getattr(self, "proj_size", 0) or self.hidden_size, device=x.device)
        return (hidden, torch.zeros(layers, batch, self.hidden_size, device=x.device))[
            : 2 if self.mode == "LSTM" else 1
        ]


class QuantizedLSTM(_Recurrent, nn.LSTM):
    """`nn.LSTM` on quantized weights."""

    KERNEL = staticmethod(torch._VF.lstm)


class QuantizedGRU(_Recurrent, nn.GRU):
    """`nn.GRU` on quantized weights."""

    KERNEL = staticmethod(torch._VF.gru)


QUANTIZED: dict[type, type] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
    nn.PReLU: QuantizedPReLU,
}
RECURRENT: dict[type, type] = {nn.LSTM: QuantizedLSTM, nn.GRU: QuantizedGRU}
