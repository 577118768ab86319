"""How products of matrices are read, by their names in `keras.ops`."""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.keras_common.arguments import Arguments
from kquant.keras_common.generation import Call
from kquant.keras_common.read_ops import add, reads, refused, rewritten, with_array
from kquant.keras_common.reader import Reader


def _dense(r: Reader, call: Call, inputs: list[str], operand: Any, apply: Any) -> list[str]:
    """A product with a matrix as a dense layer without bias, which a constant matrix is not trained in.

    Args:
        r, call, inputs: as in a handler.
        operand: a trainable array, which is the matrix itself, or a constant one.
        apply: of a constant one, (x, dense) -> the result, from the symbolic input and the layer.
    """
    matrix = np.asarray(operand, np.float32)

    def make() -> Any:
        return r.layers.Dense(matrix.shape[1], use_bias=False, name="dense")

    return with_array(r, call, inputs, operand, "matmul", make, matrix, apply)


@reads("Matmul")
def _matmul(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    a, b = args["x1"], args["x2"]
    # Of real numbers the adjoint is the transpose.
    turned = [bool(args.get(f"transpose_{side}")) or bool(args.get(f"adjoint_{side}")) for side in "ab"]
    if any(turned) and len(inputs) == 2:

        def turn(x: Any, wanted: bool) -> Any:
            order = list(range(len(x.shape)))
            return r.operations.transpose(x, [*order[:-2], order[-1], order[-2]]) if wanted else x

        return rewritten(r, call, inputs, lambda *xs: r.operations.matmul(*map(turn, xs, turned)))
    if len(inputs) < 2 and not (r.generation.is_symbolic(a) and a is b):
        return _with_matrix(r, call, inputs, a, b, turned)
    if len(a.shape) < 2 or len(b.shape) < 2:
        return refused(r, call, inputs, "a matrix product of vectors has no kernel; reshape them to matrices")
    return add(r, call, [inputs[0], inputs[-1]], "batch_matmul")


def _with_matrix(r: Reader, call: Call, inputs: list[str], a: Any, b: Any, turned: list[bool]) -> list[str]:
    """A product with one matrix, or with a constant vector, on either side."""
    left = not r.generation.is_symbolic(a)
    operand, x = (a, b) if left else (b, a)
    rank, other = len(operand.shape), len(x.shape)
    own, theirs = turned if left else turned[::-1]
    variable = r.generation.is_variable(operand)
    if rank not in (1, 2) or theirs or (left and other < 3) or (variable and (rank == 1 or own or left)):
        kind = "trainable" if variable else "constant"
        return refused(r, call, inputs, f"a product with a {kind} array of shape {tuple(operand.shape)} there")
    if variable:
        return _dense(r, call, inputs, operand, None)
    matrix = np.asarray(operand, np.float32).reshape((-1, 1) if rank == 1 else operand.shape)
    matrix = matrix.T if (left and rank == 2) != own else matrix

    def apply(x: Any, dense: Any) -> Any:
        order = [*range(other - 2), other - 1, other - 2]
        y = dense(r.operations.transpose(x, order) if left else x)
        y = r.operations.transpose(y, order) if left else y
        sizes = [-1, *call.shape[1:]]
        return r.operations.reshape(y, sizes) if rank == 1 else y

    return _dense(r, call, inputs, matrix, apply)


@reads("Dot", "Tensordot")
def _dot(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    """With a constant matrix: over the last axis of the tensor, which is a product of matrices."""
    a, b = args["x1"], args["x2"]
    axes = args.get("axes", 1)
    last = axes == 1 or (isinstance(axes, (list, tuple)) and [np.ravel(v).tolist() for v in axes] == [[-1], [0]])
    if len(inputs) != 1 or not r.generation.is_symbolic(a) or len(b.shape) > 2 or not last:
        return refused(r, call, inputs, f"the operation {name} is read with a constant matrix or vector behind it only")
    return _with_matrix(r, call, inputs, a, b, [False, False])


# -- einsum ---------------------------------------------------------------------------------------------------------


def _letters(subscripts: str, ranks: list[int]) -> tuple[list[str], str]:
    """The operands and the result of an einsum with a letter for every axis."""
    given, _, result = subscripts.replace(" ", "").partition("->")
    sides = given.split(",")
    free = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in subscripts]
    spare = [rank - len(side.replace("...", "")) for side, rank in zip(sides, ranks, strict=True)]
    names = [free[n - 1 :: -1] if n > 0 else [] for n in spare]  # aligned at the right, as numpy broadcasts
    longest = max(names, key=len)
    if "->" not in subscripts:
        once = sorted(c for c in set(given) - set(",.") if given.count(c) == 1)
        result = ("..." if "..." in given else "") + "".join(once)
    return [s.replace("...", "".join(n)) for s, n in zip(sides, names, strict=True)], result.replace(
        "...", "".join(longest)
    )


@reads("Einsum")
def _einsum(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    """Sums and orders of one tensor; of two: batch letters first, then one matrix product, then the wanted order."""
    subscripts = args["subscripts"]
    operands = args.get("operands", args.get("inputs", ()))
    ranks = [len(x.shape) for x in operands]
    variable = any(map(r.generation.is_variable, operands))
    if not 1 <= len(operands) <= 2 or variable or len(call.inputs) != len(inputs):
        return refused(r, call, inputs, f"the einsum {subscripts!r} is not of one or two tensors")
    sides, out = _letters(subscripts, ranks)
    if any(len(set(side)) != len(side) for side in sides):
        return refused(r, call, inputs, f"the einsum {subscripts!r} has a letter twice in one operand")
    symbolic = [r.generation.is_symbolic(x) for x in operands]
    if any(is_data and side[0] != out[:1] for side, is_data in zip(sides, symbolic, strict=True)):
        return refused(r, call, inputs, f"the einsum {subscripts!r} does not keep the batch as first axis")
    if len(sides) == 1:
        return rewritten(
            r, call, inputs, lambda x: _ordered(r.operations, *_summed(r.operations, x, sides[0], out), out)
        )
    if not all(symbolic):
        at = symbolic.index(True)
        return _with_constant(r, call, inputs, sides[at], sides[1 - at], out, np.asarray(operands[1 - at], np.float32))
    same = len(inputs) == 1
    return rewritten(r, call, inputs, lambda *xs: _product(r.operations, xs[0], xs[0] if same else xs[1], *sides, out))


def _summed(ops: Any, x: Any, letters: str, kept: str) -> tuple[Any, str]:
    """A tensor without the axes whose letters nothing else has, and its letters."""
    gone = [i for i, c in enumerate(letters) if c not in kept]
    if not gone:
        return x, letters
    return ops.sum(x, axis=tuple(gone), keepdims=False), "".join(c for c in letters if c in kept)


def _ordered(ops: Any, x: Any, letters: str, out: str) -> Any:
    """A tensor with its axes in the order of `out`; axes that it lacks have size 1."""
    present = [c for c in out if c in letters]
    if "".join(present) != letters:
        x = ops.transpose(x, [letters.index(c) for c in present])
    for axis, c in enumerate(out):
        x = x if c in letters else ops.expand_dims(x, axis)
    return x


def _product(ops: Any, x: Any, y: Any, a: str, b: str, out: str) -> Any:
    x, a = _summed(ops, x, a, out + b)
    y, b = _summed(ops, y, b, out + a)
    shared = [c for c in a if c in b]
    batch, inner = [c for c in shared if c in out], [c for c in shared if c not in out]
    left, right = [c for c in a if c not in shared], [c for c in b if c not in shared]
    if not inner:
        return _ordered(ops, x, a, out) * _ordered(ops, y, b, out)
    sizes = {**dict(zip(a, x.shape, strict=True)), **dict(zip(b, y.shape, strict=True))}
    parts = [_as_matrix(ops, *side, sizes) for side in ((x, a, batch, left, inner), (y, b, batch, inner, right))]
    z = ops.matmul(*parts)
    shape = [sizes[c] for c in batch + left + right]
    z = ops.reshape(z, [-1 if s is None else s for s in shape])
    return ops.transpose(z, [(batch + left + right).index(c) for c in out])


def _as_matrix(ops: Any, x: Any, letters: str, batch: list, rows: list, columns: list, sizes: dict) -> Any:
    x = ops.transpose(x, [letters.index(c) for c in batch + rows + columns])
    shape = [sizes[c] for c in batch]
    shape += [int(np.prod([sizes[c] for c in side])) for side in (rows, columns)]
    return ops.reshape(x, [-1 if s is None else s for s in shape])


def _with_constant(
    r: Reader, call: Call, inputs: list[str], a: str, b: str, out: str, constant: np.ndarray
) -> list[str]:
    """With a constant array: a dense layer over what they contract, or an elementwise product."""
    ops = r.operations
    alone = [i for i, c in enumerate(b) if c not in out + a]
    constant = constant.sum(axis=tuple(alone))
    b = "".join(c for c in b if c in out + a)
    inner, new = [c for c in b if c in a and c not in out], [c for c in b if c not in a]
    if not inner and not new:
        order = constant.transpose([b.index(c) for c in out if c in b])
        order = order.reshape([order.shape[[c for c in out if c in b].index(c)] if c in b else 1 for c in out])
        return rewritten(r, call, inputs, lambda x: _ordered(ops, *_summed(ops, x, a, out), out) * order)
    rest = [c for c in a if c not in inner and c in out]
    if [c for c in b if c in rest] or a[0] in inner:
        return refused(r, call, inputs, f"the einsum {call.layer.name!r} contracts each of a batch with its own matrix")
    matrix = constant.transpose([b.index(c) for c in inner + new])
    matrix = matrix.reshape(int(np.prod(matrix.shape[: len(inner)])), -1)

    def apply(x: Any, dense: Any) -> Any:
        x, letters = _summed(ops, x, a, out + b)
        sizes = dict(zip(letters, x.shape, strict=True)) | dict(zip(b, constant.shape, strict=True))
        x = ops.transpose(x, [letters.index(c) for c in rest + inner])
        x = ops.reshape(x, [-1, *(sizes[c] for c in rest[1:]), matrix.shape[0]])
        y = ops.reshape(dense(x), [-1, *(sizes[c] for c in rest[1:]), *(sizes[c] for c in new)])
        return ops.transpose(y, [(rest + new).index(c) for c in out])

    return _dense(r, call, inputs, matrix, apply)
