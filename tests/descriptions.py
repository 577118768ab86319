"""Random models as plain data, for every front end to build: made by hypothesis, so that a failure shrinks.

A model is a list of records in topological order. Shapes and arrays are channels-last without the batch, arrays lie as
in Keras; a front end that stores them otherwise transposes. `models(index)` forces, in turn, kinds of ops, a quantizer
and bits, so that any 200 consecutive indices hold every table row; everything else is drawn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import numpy as np
from description_kinds import KINDS, LARGEST, Shape
from hypothesis import strategies as st

QUANTIZERS = ("qat", "dorefa", "naive")
WEIGHT_BITS = {"qat": tuple(range(2, 9)), "naive": tuple(range(2, 9)), "dorefa": tuple(range(1, 9))}
OUTPUT_BITS = (8, 4, 2, 8, 3, 6, 8, 5, 7, 4)
FORCED = 4  # kinds in turn in a model, beside one with a kernel


@dataclass(frozen=True)
class Node:
    """One call of a layer or an operation; a name that came before is that layer, called again.

    Tensor 0 is the model's input and tensor i + 1 the output of node i.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    shape: Shape
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """A model, how it is quantized, and the seed of its weights and data.

    Args:
        shape: of the input.
        vocabulary: number of ids if the input is ids, else 0.
        nodes: in topological order.
        outputs: tensors that nothing reads.
        config: a `config_list`.
        seed: of all weights and data.
        train: whether one training step is taken before the export.
    """

    shape: Shape
    vocabulary: int
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    config: tuple[Mapping[str, Any], ...]
    seed: int
    train: bool

    def data(self, salt: int, samples: int = 6) -> np.ndarray:
        """Samples of the input: float32, or int32 ids."""
        rng = np.random.default_rng((self.seed, salt))
        size = (samples, *self.shape)
        if self.vocabulary:
            return rng.integers(0, self.vocabulary, size).astype(np.int32)
        return rng.normal(0, 1, size).astype(np.float32)

    def weight(self, name: str, role: str, shape: Shape) -> np.ndarray:
        """A layer's array by its role: `kernel`, `bias`, `gamma`, `beta`, `mean`, `variance` or `slope`.

        Dead channels, zero and negative gammas, and channels of very different size are all in there.
        """
        rng = np.random.default_rng((self.seed, *f"{name}/{role}".encode()))
        values = rng.normal(0, 1, shape)
        if role == "kernel":
            values *= math.sqrt(1.5 / max(1, math.prod(shape[:-1])))
        per_channel = shape[-1:]
        if role in ("kernel", "gamma"):
            values *= np.exp(rng.normal(0, 0.7, per_channel))
            values *= rng.random(per_channel) > 0.1  # dead ones
        elif role == "variance":
            values = np.exp(values)
        elif role == "slope":
            values = 0.25 * values
        elif role in ("bias", "beta", "mean"):
            values = 0.3 * values
        return values.astype(np.float32)


# -- the growing net --------------------------------------------------------------------------------------------------


class Net:
    """Draws a model node by node. The first option of each draw is the one that shrinking goes to."""

    def __init__(self, draw: Callable, shape: Shape, vocabulary: int = 0):
        self.draw, self.vocabulary = draw, vocabulary
        self.shapes: list[Shape] = [shape]
        self.nodes: list[Node] = []

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def usually(self) -> bool:
        """True but for one draw in twenty, which is where shrinking goes."""
        return self.pick(*range(20)) > 0

    def add(self, kind: str, inputs: tuple[int, ...], shape: Shape, **args: Any) -> int:
        """Append a node of a new layer; returns its tensor."""
        self.nodes.append(Node(kind, f"{kind}_{len(self.nodes)}", inputs, tuple(shape), args))
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def again(self, tensor: int, x: int) -> int:
        """Call the layer that made `tensor` on x as well."""
        self.nodes.append(dataclasses.replace(self.nodes[tensor - 1], inputs=(x,)))
        self.shapes.append(self.shapes[tensor])
        return len(self.shapes) - 1

    def tensor(self, ranks: tuple[int, ...], largest: int = LARGEST) -> int:
        """A tensor with one of these ranks, most often the latest; made from the latest if there is none."""
        first = 1 if self.vocabulary else 0
        fits = [
            i for i in reversed(range(first, len(self.shapes)))
            if len(self.shapes[i]) in ranks and math.prod(self.shapes[i]) <= largest
        ]  # fmt: skip
        if fits:
            return self.pick(fits[0], fits[0], *fits)
        last = len(self.shapes) - 1
        size, channels = math.prod(self.shapes[last]), self.shapes[last][-1]
        if size > largest and len(self.shapes[last]) == 1:
            self.add("dense", (last,), (6,), units=6, bias=True, activation=None)
            return self.tensor(ranks, largest)
        if size > largest:
            axes = tuple(range(1, len(self.shapes[last])))
            self.add("reduce", (last,), (channels,), function="mean", axes=axes, keepdims=False)
            return self.tensor(ranks, largest)
        shape = {1: (size,), 2: (size // channels, channels), 3: (1, size // channels, channels)}[ranks[0]]
        return self.add("flatten" if ranks[0] == 1 else "reshape", (last,), shape)

    def twins(self, x: int, count: int) -> tuple[int, ...]:
        """`count` tensors of the shape of x, x first: others of the net, itself, or new ones made from it."""
        found = [x]
        same = [i for i, s in enumerate(self.shapes) if s == self.shapes[x] and not (self.vocabulary and i == 0)]
        while len(found) < count:
            at = self.pick(None, *same)
            if at is None:
                at = KINDS[self.pick("activation", "dense", "batch_norm")][0](self, x)
                if self.shapes[at] != self.shapes[x]:
                    at = self.add("dense", (at,), self.shapes[x], units=self.shapes[x][-1], bias=True, activation=None)
            found.append(at)
        return tuple(found)


# -- whole models -----------------------------------------------------------------------------------------------------

RANKS = (3, 2, 3, 1, 3, 2, 0)  # of the input; 0 is ids


def forced(index: int) -> tuple[int, list[str]]:
    """The input's rank and the kinds that model `index` holds, in turn of those that the rank allows."""
    rank = RANKS[index % len(RANKS)]
    names = [k for k, (_, ranks) in KINDS.items() if (rank or 2) in ranks]
    turn = sum(r == rank for r in RANKS) * (index // len(RANKS)) + RANKS[: index % len(RANKS)].count(rank)
    kernels = [k for k in ("dense", "conv", "depthwise", "normed", "conv_transpose") if k in names]
    return rank, [kernels[turn % len(kernels)], *(names[(FORCED * turn + i) % len(names)] for i in range(FORCED))]


@st.composite
def models(draw: Callable, index: int) -> Description:
    """A random model of which `index` decides what it must hold."""
    seed = draw(st.integers(0, 9999))
    hypothesis.assume(seed)  # 0 is the plainest model of all, which hypothesis tries first each time
    rank, kinds = forced(index)
    channels = draw(st.sampled_from((3, 1, 2, 4, 5, 8)))
    sizes = tuple(draw(st.sampled_from((5, 4, 6, 8))) for _ in range(max(rank, 1) - 1))
    vocabulary = 0 if rank else 11
    net = Net(draw, (*sizes, channels) if rank else (6,), vocabulary)
    if vocabulary:
        net.add("embedding", (0,), (6, channels), vocabulary=vocabulary, units=channels)
    wanted = [k for k in kinds if net.usually()]
    wanted += draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=3))
    order = draw(st.permutations(wanted))
    for name in order or ["dense"]:
        maker, ranks = KINDS[name]
        maker(net, net.tensor(ranks))
    config = _config(net, index)
    read = {t for node in net.nodes for t in node.inputs}
    outputs = tuple(i for i in range(1, len(net.shapes)) if i not in read)
    train = index % 3 == 2 and net.usually()
    return Description(net.shapes[0], vocabulary, tuple(net.nodes), outputs, config, seed, train)


def _config(net: Net, index: int) -> tuple[dict, ...]:
    """A default entry with the bits whose turn it is, and entries for single layers."""
    turn = index // len(QUANTIZERS)
    quantizer = QUANTIZERS[index % len(QUANTIZERS)] if net.usually() else "qat"
    weight = WEIGHT_BITS[quantizer][turn % len(WEIGHT_BITS[quantizer])] if net.usually() else 8
    output = OUTPUT_BITS[(turn + index) % len(OUTPUT_BITS)] if net.usually() else 8
    bits = {"weight": weight, "output": output}
    if quantizer == "dorefa" and net.pick(False, True):
        bits["gradient"] = net.pick(8, 6, 4, 2)
    entries: list[dict] = [{"op_types": ["default"], "q_bits": bits, "quantizer": quantizer}]
    if quantizer != "dorefa" and net.pick(False, False, False, True):
        entries[0]["quant_scheme"] = {"weight": "tensor_symmetric"}
    names = [n.name for n in net.nodes if n.kind in ("conv", "depthwise", "dense", "conv_transpose", "einsum_dense")]
    for name in dict.fromkeys(net.draw(st.lists(st.sampled_from(names), max_size=2)) if names else []):
        other = net.pick(quantizer, *QUANTIZERS)
        bits = {"weight": net.pick(*reversed(WEIGHT_BITS[other])), "output": net.pick(8, 7, 6, 5, 4, 3, 2)}
        entries.append({"op_names": [name], "q_bits": bits, "quantizer": other})
    rectified = [n for n in net.nodes if n.name in names and n.args["activation"] in ("relu", "relu6")]
    if index % 2 and rectified and net.usually():
        name = net.pick(*rectified).name
        entries.append({"op_names": [name], "q_bits": {"weight": weight, "output": 1}, "quantizer": quantizer})
    return tuple(entries)
