"""Parity: how far an artifact's codes are from the trained model, op by op, and end to end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from kquant.core.affine import Affine, round_half_up
from kquant.core.reports import Report, Table

TIE = 0.01  # codes; half a unit of a bias may decide ties that are this close, and is stated where it is larger
MEAN_ERROR_LIMIT = 0.02  # codes; a kernel that truncates instead of rounding has a mean of -0.5
DEVIATIONS = 3  # standard deviations that the number of misrounded codes may lie above what the limit allows


class ParityOp(NamedTuple):
    """One op: distances in codes before rounding, against its row's bound; signal-to-noise in dB against float.

    `mean_bound` is the kernel's own, and what chance adds to it on so many codes (`DEVIATIONS`).
    """

    name: str
    kind: str
    bits: int
    max_lsb: float
    mean_error: float
    mismatch: float
    bound: float
    mean_bound: float
    codes_used: int
    snr_db: float | None

    @property
    def ok(self) -> bool:
        """Whether the op keeps its contract."""
        return self.max_lsb <= self.bound and abs(self.mean_error) <= self.mean_bound


@dataclass(frozen=True)
class ParityReport(Report):
    """What `verify` found.

    Args:
        ok: every weight, bias, scale and zero point is the trained one, and every op keeps its bound.
        max_lsb: largest |code - (real/scale + zero_point)| before rounding, after the clamp, over all ops; 0.5 is
            perfect rounding.
        mismatch: share of codes that differ from exact rounding.
        mean_error: largest mean signed distance of an op, in codes.
        end_to_end_max_lsb: largest difference of an output from the trained model's, in output codes.
        end_to_end_share: share of output values that differ by half a code or more.
        top1_agreement: share of samples whose largest output is the same; None for outputs of one value.
        problems: what is not as trained, in words.
        ops: a row per op.
    """

    title: ClassVar[str] = "Parity"

    path: str
    ok: bool
    max_lsb: float
    mismatch: float
    mean_error: float
    end_to_end_max_lsb: float
    end_to_end_share: float
    top1_agreement: float | None
    snr_db: float | None
    samples: int
    weights_checked: int
    problems: list[str]
    ops: list[ParityOp]

    def facts(self) -> list[tuple[str, Any]]:
        """The verdict and the largest distances."""
        return [
            ("file", self.path),
            ("as trained", self.ok),
            ("max_lsb", f"{self.max_lsb:.4f} (0.5 is perfect rounding)"),
            ("codes off by one", f"{self.mismatch:.4%}"),
            ("largest mean error", f"{self.mean_error:+.4f} codes"),
            ("weights and biases", f"{self.weights_checked} arrays compared"),
            ("end to end", f"{self.end_to_end_max_lsb:.2f} codes at most, {self.end_to_end_share:.2%} differ"),
            ("top-1 agreement", None if self.top1_agreement is None else f"{self.top1_agreement:.2%}"),
            ("signal to noise", None if self.snr_db is None else f"{self.snr_db:.1f} dB against the float model"),
            ("samples", self.samples),
        ]

    def tables(self) -> list[Table]:
        """What is not as trained, then every op."""
        heads = (
            "op",
            "kind",
            "bits",
            "max_lsb",
            "mean error",
            "mismatch",
            "bound",
            "mean bound",
            "codes used",
            "SNR dB",
        )
        return [("Problems", ("problem",), [(p,) for p in self.problems]), ("Ops", heads, self.ops)]


@dataclass
class OpTally:
    """Distances of one op's codes, gathered over batches."""

    name: str
    kind: str
    bound: float
    affine: Affine
    bias_slack: float = 0.0  # half a unit of the bias in output codes, where that is more than `TIE`
    mean_bound: float = MEAN_ERROR_LIMIT
    max_lsb: float = 0.0
    total: float = 0.0
    count: int = 0
    wrong: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        self.used: set[int] = set()

    def compare(self, codes: np.ndarray, real: np.ndarray) -> None:
        """Take in the artifact's codes beside the exact real results, same shape."""
        exact = np.clip(
            np.asarray(real, np.float64) / np.float64(self.affine.scale) + self.affine.zero_point,
            self.affine.qmin, self.affine.qmax,
        )  # fmt: skip
        distance = np.abs(codes - exact)
        self.max_lsb = max(self.max_lsb, float(distance.max(initial=0.0)))
        # Halfway between two codes either is right: kernels differ in their rule for ties, and it is no bias.
        tie = np.abs(distance - 0.5) < max(TIE, self.bias_slack)
        error = np.where(tie, 0.0, codes - round_half_up(exact))
        self.total += float(error.sum())
        self.wrong += int((error != 0).sum())
        self.count += codes.size
        self.used.update(np.unique(codes).tolist())

    def against_float(self, value: np.ndarray, reference: np.ndarray) -> None:
        """Take in values of the artifact beside the float model's."""
        reference = np.asarray(reference, np.float64)
        self.signal += float((reference**2).sum())
        self.noise += float(((value - reference) ** 2).sum())

    def row(self) -> ParityOp:
        """The report's row."""
        count = max(self.count, 1)
        # Of `count` codes a kernel at the limit misrounds `limit * count`, and that number scatters by its square root.
        limit = self.mean_bound + self.bias_slack
        allowed = limit + DEVIATIONS * math.sqrt(limit / count)
        return ParityOp(
            self.name, self.kind, self.affine.bits, self.max_lsb, self.total / count, self.wrong / count,
            min(self.bound + self.bias_slack, 1.0), allowed, len(self.used),
            snr_db(self.signal, self.noise),
        )  # fmt: skip


def snr_db(signal: float, noise: float) -> float | None:
    """Signal-to-noise ratio in decibels, `10 log10(signal/noise)`; None without a signal, inf without noise."""
    if signal == 0:
        return None
    return float("inf") if noise == 0 else float(10 * np.log10(signal / noise))
