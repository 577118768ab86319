"""TorchScript for the float ops that the user allowed: torch's own, between a dequantize and a quantize."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kquant.core.errors import ExportError
from kquant.core.graph import Op
from kquant.core.integer import IntOp
from kquant_torch.emit import Emitter, literal, writes

Form = Callable[[Emitter, Op, list[str]], str]


def _arrays(e: Emitter, op: Op) -> tuple[str, str]:
    """The kernel as it was trained, and the bias or None."""
    if "codes" in op.attrs:
        codes, scale = op.attrs["codes"]()
        kernel = np.asarray(codes * scale, np.float32)
    else:
        kernel = np.asarray(op.weights["kernel"].read(), np.float32)
    if op.kind == "conv2d_transpose":  # torch's own layout has the groups on the input axis
        kernel = kernel.reshape(-1, *kernel.shape[-op.attrs["rank"] - 1 :])
    bias = op.weights.get("bias")
    held = "None" if bias is None else e.array(f"{op.id}/bias", np.asarray(bias.read(), np.float32))
    return e.array(f"{op.id}/weight", kernel), held


def _windows(op: Op, *names: str) -> list[str]:
    return [literal(list(op.attrs[n])) for n in names]


def _conv(e: Emitter, op: Op, x: list[str]) -> str:
    settings = [*_windows(op, "stride", "padding", "dilation"), literal(op.attrs["groups"])]
    return f"torch.conv{op.attrs['rank']}d({', '.join([*x, *_arrays(e, op), *settings])})"


def _transposed(e: Emitter, op: Op, x: list[str]) -> str:
    settings = _windows(op, "stride", "padding", "output_padding")
    settings += [literal(op.attrs["groups"]), *_windows(op, "dilation")]
    return f"torch.conv_transpose{op.attrs['rank']}d({', '.join([*x, *_arrays(e, op), *settings])})"


def _dense(e: Emitter, op: Op, x: list[str]) -> str:
    return f"torch.linear({', '.join([*x, *_arrays(e, op)])})"


def _affine(e: Emitter, op: Op, x: list[str]) -> str:
    shape = [1] * e.rank(op.inputs[0])
    shape[op.attrs["axis"]] = -1
    roles = ("scale", "offset")
    held = [e.array(f"{op.id}/{r}", np.asarray(op.weights[r].read(), np.float32).reshape(shape)) for r in roles]
    return f"torch.add(torch.mul({x[0]}, {held[0]}), {held[1]})"


def _relu(e: Emitter, op: Op, x: list[str]) -> str:
    limit = op.attrs.get("max")
    return f"torch.relu({x[0]})" if limit is None else f"torch.clamp({x[0]}, 0.0, {literal(float(limit))})"


def _softmax(e: Emitter, op: Op, x: list[str]) -> str:
    scores = f"torch.mul({x[0]}, {literal(float(op.attrs.get('beta', 1.0)))})"
    if "mask" in op.attrs:
        added = np.where(op.attrs["mask"], 0.0, -np.inf).astype(np.float32)
        scores = f"torch.add({scores}, {e.array(f'{op.id}/mask', added)})"
    return f"torch.softmax({scores}, {op.attrs['dim']})"


def _reduced(e: Emitter, op: Op, x: list[str]) -> str:
    return f"torch.{op.kind}({x[0]}, {literal(list(op.attrs['dim']))}, {bool(op.attrs['keepdim'])})"


def _named(name: str) -> Form:
    def form(e: Emitter, op: Op, x: list[str]) -> str:
        return f"torch.{name}({', '.join(x)})"

    return form


def _reshape(e: Emitter, op: Op, x: list[str]) -> str:
    return f"torch.reshape({x[0]}, {literal([-1 if s is None else int(s) for s in op.attrs['shape']])})"


FORMS: dict[str, Form] = {
    "conv2d": _conv,
    "conv2d_transpose": _transposed,
    "dense": _dense,
    "channel_affine": _affine,
    "relu": _relu,
    "softmax": _softmax,
    "mean": _reduced,
    "sum": _reduced,
    "reshape": _reshape,
    **{kind: _named(kind) for kind in ("add", "sub", "mul", "maximum", "minimum", "sigmoid", "tanh")},
    "batch_matmul": _named("matmul"),
}


@writes("float")
def _float(e: Emitter, op: IntOp) -> str:
    """One op, in float.

    Raises:
        ExportError: an op that has no form here, by layer name.
    """
    (part,) = op.parts
    if part.kind not in FORMS:
        raise ExportError(
            f"layer {part.layer!r} ({part.type_name})",
            "a float op that the artifact can hold",
            part.attrs.get("reason", part.kind),
            "Cut it off before the export, or write it with other layers",
        )
    return FORMS[part.kind](e, part, [e.codes(t) for t in op.inputs])


# Float functions with a kernel, the second argument, and the axis of it that holds the output channels of a group.
CHANNEL_AXIS = {"torch.linear": 0}
CHANNEL_AXIS |= {f"torch.conv{n}d": 0 for n in (1, 2, 3)} | {f"torch.conv_transpose{n}d": 1 for n in (1, 2, 3)}
