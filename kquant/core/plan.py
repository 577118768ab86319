"""The plan: which tensors and weights are quantized, and how. Data only; `kquant.core.placement` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kquant.core.affine import INT8_MAX, Affine
from kquant.core.graph import Graph
from kquant.core.reports import Report, table


@dataclass(frozen=True)
class Spec:
    """One range: the tensors that share it and how it is found.

    Args:
        id: the spec's name, after the first tensor that has it.
        bits: 1..8, or 16.
        fixed: parameters that the kernel prescribes; None for an observed range.
        unit: DoReFa's range [0, 1].
        symmetric: zero point 0.
        nonneg: no value is below zero, so the range starts at zero.
        start_step: observe without quantizing until this training step.
        sites: how many tensors observe it.
        naive: the range comes from calibration or from the first batch and does not move afterwards.
    """

    id: str
    bits: int = 8
    fixed: Affine | None = None
    unit: bool = False
    symmetric: bool = False
    nonneg: bool = False
    start_step: int = 0
    sites: int = 0
    naive: bool = False

    def describe(self) -> str:
        """A few words for a person."""
        kind = "fixed" if self.fixed else "[0, 1]" if self.unit else "symmetric" if self.symmetric else "observed"
        return f"{self.bits} bit {kind}"


@dataclass(frozen=True)
class WeightSpec:
    """How one weight array is quantized: recipe, bits, whether a scale per output channel, gradient bits or None.

    Codes stay within ±`largest`. `folds_norm` is the id of the batch norm whose gain the kernel is quantized with,
    where one scale is to hold all channels of the two together.
    """

    quantizer: str
    bits: int
    per_channel: bool = True
    gradient_bits: int | None = None
    start_step: int = 0
    largest: int = INT8_MAX
    folds_norm: str | None = None


@dataclass(frozen=True)
class Site:
    """A place where a tensor is fake-quantized.

    Args:
        spec: the range.
        index: of the observer; None where it only rounds.
        boundary: the tensor comes from an op that the config leaves in float.
    """

    spec: str
    index: int | None
    boundary: bool = False


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan as a person reads it."""

    layer: str
    type: str
    kind: str
    weight: str
    output: str
    kernel: str
    note: str = ""


@dataclass(frozen=True)
class Plan(Report):
    """What will be quantized and how, before anything happens.

    Args:
        graph: the model that was read.
        specs: activation ranges by id.
        sites: for a tensor, the fake quantizations that all its integer readers see, in order.
        edges: for (op id, input index), a further fake quantization that only this reader sees (a requantize).
        weights: for an op id, how its kernel is quantized.
        integer: ids of the ops that run in integers.
        floats: for an op id, why it stays float.
        rows: one line per op.
        target: where the model is to run.
    """

    graph: Graph
    specs: Mapping[str, Spec]
    sites: Mapping[str, tuple[Site, ...]]
    edges: Mapping[tuple[str, int], Site]
    weights: Mapping[str, WeightSpec]
    integer: frozenset[str]
    floats: Mapping[str, str]
    rows: tuple[PlanRow, ...] = field(default=())
    target: str = "tflite"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "model": self.graph.name,
            "target": self.target,
            "rows": [vars(r) for r in self.rows],
            "specs": {s.id: s.describe() for s in self.specs.values()},
            "requantize": [f"{op}[{i}] -> {site.spec}" for (op, i), site in self.edges.items()],
            "float": dict(self.floats),
        }

    def __str__(self) -> str:
        """The plan as a table."""
        head = ["layer", "type", "op", "weight", "output", "kernel", "note"]
        return table([list(vars(r).values()) for r in self.rows], head)
