"""The functions that an artifact brings along, in TorchScript: integer arithmetic where torch has no integer kernel.

Each text goes into the file as it stands here, if the model needs it, so an artifact runs where this project is not
installed. Codes are uint8, which is the code of the integer model plus 128. Data types are numbers there: 0 is uint8,
1 int8, 3 int32, 4 int64, 6 float32. Every function takes the scale and zero point of what it reads and writes, turns
their ratio into an integer factor of 2^-shift, and rounds half up: `(sum * factor + 2^(shift-1)) >> shift`.
"""

from __future__ import annotations

FUNCTIONS: dict[str, str] = {}


def _enter(text: str) -> None:
    text = text.strip() + "\n"
    FUNCTIONS[text[len("def ") : text.index("(")]] = text


# floor(x / scale + 0.5) + zero_point: the conversion to uint8 cuts off the fraction of a number that is not negative.
_enter("""
def quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
  y = torch.add_(torch.div(x, scale), zero_point + 0.5)
  return torch.to(torch.clamp_(y, low, high), 0)
""")
_enter("""
def dequantize(x: Tensor, x_scale: float, x_zero_point: int) -> Tensor:
  return torch.mul(torch.sub(torch.to(x, 3), x_zero_point), x_scale)
""")
# At most 255 * |factor| of either operand: `shift` keeps their sum within int32 (`emit.shift_for`).
_enter("""
def add(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int, scale: float,
    zero_point: int, low: int, high: int, sign: int, shift: int) -> Tensor:
  unit = float(1 << shift) / scale
  a_factor = int(round(a_scale * unit))
  b_factor = int(round(b_scale * unit)) * sign
  offset = (zero_point << shift) + (1 << (shift - 1)) - a_zero_point * a_factor - b_zero_point * b_factor
  y = torch.mul_(torch.to(a, 3), a_factor)
  y = torch.add_(torch.add(y, torch.to(b, 3), alpha=b_factor), offset)
  return torch.to(torch.clamp_(torch.bitwise_right_shift_(y, shift), low, high), 0)
""")
# The product is below 2^16 and the factor at most 2^14 (`emit.shift_for`).
_enter("""
def mul(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int, scale: float,
    zero_point: int, low: int, high: int, shift: int) -> Tensor:
  factor = int(round(a_scale * b_scale / scale * float(1 << shift)))
  y = torch.mul(torch.sub(torch.to(a, 3), a_zero_point), torch.sub(torch.to(b, 3), b_zero_point))
  y = torch.add_(torch.mul_(y, factor), (zero_point << shift) + (1 << (shift - 1)))
  return torch.to(torch.clamp_(torch.bitwise_right_shift_(y, shift), low, high), 0)
""")
# The sum is exact in int32 up to 2^23 values; the factor of 2^-32 is exact to 2^-17 of the mean's own code.
_enter("""
def mean(
    x: Tensor, x_scale: float, x_zero_point: int, scale: float, zero_point: int, low: int, high: int,
    dim: List[int], keepdim: bool) -> Tensor:
  total = torch.sum(x, dim, keepdim, dtype=3)
  count = torch.floordiv(torch.numel(x), torch.numel(total))
  factor = int(round(x_scale / (scale * float(count)) * 4294967296.0))
  y = torch.mul_(torch.sub(torch.to(total, 4), count * x_zero_point), factor)
  y = torch.bitwise_right_shift_(torch.add_(y, 2147483648), 32)
  return torch.to(torch.clamp_(torch.add_(y, zero_point), low, high), 0)
""")
_enter("""
def sum(
    x: Tensor, x_scale: float, x_zero_point: int, scale: float, zero_point: int, low: int, high: int,
    dim: List[int], keepdim: bool, shift: int) -> Tensor:
  total = torch.sum(x, dim, keepdim, dtype=3)
  count = torch.floordiv(torch.numel(x), torch.numel(total))
  factor = int(round(x_scale / scale * float(1 << shift)))
  y = torch.mul_(torch.sub(torch.to(total, 4), count * x_zero_point), factor)
  y = torch.bitwise_right_shift_(torch.add_(y, 1 << (shift - 1)), shift)
  return torch.to(torch.clamp_(torch.add_(y, zero_point), low, high), 0)
""")
# Over the last axis of a channels_last image, so that the result lies in memory as its input does.
_enter("""
def lookup(x: Tensor, table: Tensor) -> Tensor:
  if torch.eq(torch.dim(x), 4):
    y = torch.permute(x, [0, 2, 3, 1])
    index = torch.reshape(torch.to(y, 3), [-1])
    found = torch.reshape(torch.index_select(table, 0, index), torch.size(y))
    result = torch.permute(found, [0, 3, 1, 2])
  else:
    index0 = torch.reshape(torch.to(x, 3), [-1])
    result = torch.reshape(torch.index_select(table, 0, index0), torch.size(x))
  return result
""")
# `table` holds one table per slope, `start` where each begins, in a shape that broadcasts against x.
_enter("""
def lookup_by_slope(x: Tensor, table: Tensor, start: Tensor) -> Tensor:
  index = torch.add(torch.to(x, 3), start)
  return torch.reshape(torch.index_select(table, 0, torch.reshape(index, [-1])), torch.size(x))
""")
# `table[d]` is exp(-d * scale) in units of 2^-23: 256 e / sum(e), rounded half up, by integer division.
_enter("""
def softmax(x: Tensor, table: Tensor, dim: int) -> Tensor:
  distance = torch.to(torch.sub(torch.amax(x, [dim], True), x), 3)
  found = torch.to(torch.index_select(table, 0, torch.reshape(distance, [-1])), 4)
  e = torch.reshape(found, torch.size(x))
  total = torch.sum(e, [dim], True)
  code = torch.floor_divide(torch.add(torch.mul(e, 512), total), torch.mul(total, 2))
  return torch.to(torch.clamp_(code, 0, 255), 0)
""")
# `mask` is 1 where a code counts, else 0; in each row one counts at least. The codes of the others are taken for 0,
# which none is below, so the greatest of all is the greatest of those that count.
_enter("""
def masked_softmax(x: Tensor, table: Tensor, mask: Tensor, dim: int) -> Tensor:
  kept = torch.mul(torch.to(x, 3), mask)
  distance = torch.sub(torch.amax(kept, [dim], True), kept)
  found = torch.to(torch.index_select(table, 0, torch.reshape(distance, [-1])), 4)
  e = torch.mul(torch.reshape(found, torch.size(x)), mask)
  total = torch.sum(e, [dim], True)
  code = torch.floor_divide(torch.add(torch.mul(e, 512), total), torch.mul(total, 2))
  return torch.to(torch.clamp_(code, 0, 255), 0)
""")
# One factor per channel along an axis: a depthwise kernel over an image of one row.
_enter("""
def channel_affine(
    x: Tensor, x_scale: float, x_zero_point: int, kernel: Tensor, kernel_scale: Tensor, kernel_zero: Tensor,
    bias: Tensor, scale: float, zero_point: int, attr: str, scalars: List[Optional[number]], axis: int) -> Tensor:
  y = torch.movedim(x, axis, -1)
  channels = torch.size(y, -1)
  flat = torch.permute(torch.reshape(y, [1, 1, -1, channels]), [0, 3, 1, 2])
  z = ops.onednn.qconv_pointwise(
    flat, x_scale, x_zero_point, kernel, kernel_scale, kernel_zero, bias, [1, 1], [0, 0], [1, 1], channels,
    scale, zero_point, 0, attr, scalars, "")
  return torch.movedim(torch.reshape(torch.permute(z, [0, 2, 3, 1]), torch.size(y)), -1, axis)
""")
# The same by `quantized::conv2d`, whose packed kernel has the scales and biases in it.
_enter("""
def channel_affine_quantized(
    x: Tensor, x_scale: float, x_zero_point: int,
    kernel: __torch__.torch.classes.quantized.Conv2dPackedParamsBase, scale: float, zero_point: int, low: int,
    high: int, axis: int) -> Tensor:
  y = torch.movedim(x, axis, -1)
  flat = torch.permute(torch.reshape(y, [1, 1, -1, torch.size(y, -1)]), [0, 3, 1, 2])
  q = torch._make_per_tensor_quantized_tensor(flat, x_scale, x_zero_point)
  z = torch.clamp(torch.int_repr(ops.quantized.conv2d(q, kernel, scale, zero_point)), low, high)
  return torch.movedim(torch.reshape(torch.permute(z, [0, 2, 3, 1]), torch.size(y)), -1, axis)
""")
# Plain codes and scales become a kernel of the engine that is chosen when the file is loaded.
for _rank, _type in ((1, "Conv2d"), (2, "Conv2d"), (3, "Conv3d")):
    _enter(f"""
def pack_conv{_rank}d(
    kernel: Tensor, kernel_scale: Tensor, bias: Tensor, stride: List[int], padding: List[int], dilation: List[int],
    groups: int) -> __torch__.torch.classes.quantized.{_type}PackedParamsBase:
  zero_points = torch.zeros(torch.size(kernel_scale), dtype=4)
  weight = torch._make_per_channel_quantized_tensor(kernel, kernel_scale, zero_points, 0)
  return ops.quantized.conv{_rank}d_prepack(weight, bias, stride, padding, dilation, groups)
""")
_enter("""
def pack_linear(
    kernel: Tensor, kernel_scale: Tensor, bias: Tensor) -> __torch__.torch.classes.quantized.LinearPackedParamsBase:
  zero_points = torch.zeros(torch.size(kernel_scale), dtype=4)
  weight = torch._make_per_channel_quantized_tensor(kernel, kernel_scale, zero_points, 0)
  return ops.quantized.linear_prepack(weight, bias)
""")
# torch.max_pool3d asks of uint8 that the size of an image fits it; the maximum over depth is one of its own.
_enter("""
def max_pool3d(
    x: Tensor, window: List[int], stride: List[int], padding: List[int], dilation: List[int],
    ceil_mode: bool) -> Tensor:
  size = torch.size(x)
  slices = torch.reshape(x, [size[0], size[1] * size[2], size[3], size[4]])
  y = ops.quantized.max_pool2d(
    slices, [window[1], window[2]], [stride[1], stride[2]], [padding[1], padding[2]], [dilation[1], dilation[2]],
    ceil_mode)
  rows = torch.size(y, 2)
  columns = torch.size(y, 3)
  z = torch.reshape(y, [size[0], size[1], size[2], rows * columns])
  w = ops.quantized.max_pool2d(z, [window[0], 1], [stride[0], 1], [padding[0], 0], [dilation[0], 1], ceil_mode)
  return torch.reshape(w, [size[0], size[1], torch.size(w, 2), rows, columns])
""")
# Zeros between the elements, which are zero points: what turns a transposed convolution into an ordinary one.
_enter("""
def spread(x: Tensor, x_zero_point: int, stride: List[int], before: List[int], after: List[int]) -> Tensor:
  size = torch.size(x)
  wide = annotate(List[int], [size[0], size[1]])
  rank = torch.len(stride)
  for i in range(rank):
    _0 = torch.append(wide, (size[i + 2] - 1) * stride[i] + 1 + before[i] + after[i])
  y = torch.full(wide, x_zero_point, dtype=0)
  view = y
  for i0 in range(rank):
    view = torch.slice(view, i0 + 2, before[i0], before[i0] + (size[i0 + 2] - 1) * stride[i0] + 1, stride[i0])
  _1 = torch.copy_(view, x)
  return y
""")
# (a - a_zero_point) @ (b - b_zero_point) in int32, then a factor in int64.
_enter("""
def matmul(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int, scale: float,
    zero_point: int, low: int, high: int, shift: int) -> Tensor:
  factor = int(round(a_scale * b_scale / scale * float(1 << shift)))
  product = torch.matmul(torch.sub(torch.to(a, 3), a_zero_point), torch.sub(torch.to(b, 3), b_zero_point))
  y = torch.add_(torch.mul_(torch.to(product, 4), factor), 1 << (shift - 1))
  return torch.to(torch.clamp_(torch.add_(torch.bitwise_right_shift_(y, shift), zero_point), low, high), 0)
""")
# Weights of 2^-14 along one axis after the other; the coordinates are those of torch's own interpolation.
_enter("""
def resize_linear(x: Tensor, size: List[int], factor: List[float], align_corners: bool) -> Tensor:
  y = torch.to(x, 4)
  rank = torch.dim(x) - 2
  for i in range(rank):
    given = torch.size(x, i + 2)
    if torch.gt(torch.len(factor), 0):
      wanted = int(torch.floor(float(given) * factor[i]))
      step = 1.0 / factor[i]
    else:
      wanted = size[i]
      step = float(given) / float(wanted)
    place = torch.arange(wanted, dtype=7)
    if align_corners:
      at = torch.mul(place, float(given - 1) / float(max(wanted - 1, 1)))
    else:
      at = torch.clamp(torch.sub(torch.mul(torch.add(place, 0.5), step), 0.5), 0.0)
    first = torch.clamp(torch.to(torch.floor(at), 4), 0, given - 1)
    second = torch.clamp(torch.add(first, 1), 0, given - 1)
    weight = torch.to(torch.round(torch.mul(torch.sub(at, first), 16384.0)), 4)
    form = [wanted]
    for j in range(rank - 1 - i):
      _0 = torch.append(form, 1)
    w = torch.reshape(weight, form)
    a = torch.mul(torch.index_select(y, i + 2, first), torch.rsub(w, 16384))
    y = torch.add_(a, torch.mul(torch.index_select(y, i + 2, second), w))
  bits = 14 * rank
  return torch.to(torch.bitwise_right_shift_(torch.add_(y, 1 << (bits - 1)), bits), 0)
""")
