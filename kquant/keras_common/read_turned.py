"""Transposes that move the batch behind other axes, for code that then takes those axes apart (`q, k, v = qkv`).

No such tensor is in the artifact: each part is taken from the tensor before the transpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kquant.keras_common.generation import Call
from kquant.keras_common.read_ops import refused
from kquant.keras_common.reader import Reader

MOVED = "a transpose that moves the batch axis has no counterpart in the artifact, unless integers index what is first"


@dataclass(frozen=True)
class Turned:
    """A tensor whose batch is not the first axis.

    Args:
        call: the transpose.
        source: the tensor before it.
        perm: its axes, as places in the source.
    """

    call: Call
    source: str
    perm: tuple[int, ...]


def turn(r: Reader, call: Call, source: str, perm: tuple[int, ...]) -> list[str]:
    """A transpose of which only parts are read."""
    tensor = r.aside(f"{call.layer.name}/turned", call)
    r.turned[tensor] = Turned(call, source, perm)
    return [tensor]


def whole(r: Reader, tensor: str) -> str:
    """A tensor that another op than an index reads, which is refused if it is a turned one."""
    turned = r.turned.get(tensor)
    return tensor if turned is None else refused(r, turned.call, [turned.source], MOVED)[0]


def unstacked(r: Reader, call: Call, tensor: str, axis: int) -> list[str]:
    """Each part along the first axis of a turned tensor."""
    if axis:
        return refused(r, call, [whole(r, tensor)], MOVED)
    return _taken(r, call, r.turned[tensor], [(i,) for i in range(len(call.shapes))])


def indexed(r: Reader, call: Call, tensor: str, key: tuple) -> list[str]:
    """A part of a turned tensor: integers for all axes before the batch, and none or slices for those behind it."""
    turned = r.turned[tensor]
    batch, rank = turned.perm.index(0), len(turned.perm)
    if Ellipsis in key:
        at = key.index(Ellipsis)
        key = (*key[:at], *[slice(None)] * (rank - len(key) + 1), *key[at + 1 :])
    first = all(isinstance(k, (int, np.integer)) for k in key[:batch]) and len(key) >= batch
    rest = all(isinstance(k, (int, np.integer, slice)) for k in key[batch + 1 :])
    if not (first and rest and key[batch : batch + 1] in ((), (slice(None),))):
        return refused(r, call, [whole(r, tensor)], MOVED)
    return _taken(r, call, turned, [key])


def _taken(r: Reader, call: Call, turned: Turned, keys: list[tuple]) -> list[str]:
    symbolic = r.generation.input(r.shape(turned.source), r.tensors[turned.source].dtype)
    parts = r.generation.keras.Model(symbolic, [_part(r.operations, turned.perm, key)(symbolic) for key in keys])
    path = "/".join((*r.scope.path, call.layer.name))
    with r.inside(call.layer.name, (path, type(call.layer).__name__)):
        return r.function(parts, [turned.source])


def _part(ops: Any, perm: tuple[int, ...], key: tuple) -> Callable[[Any], Any]:
    own: list[Any] = [slice(None)] * len(perm)
    for axis, part in zip(perm, key, strict=False):
        own[axis] = part
    left = [axis for axis, part in enumerate(own) if isinstance(part, slice)]
    order = [left.index(axis) for axis in perm if axis in left]
    return lambda x: ops.transpose(x[tuple(own)], order)
