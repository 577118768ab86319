"""The state of what kquant put into a graph, as readers of the trained graph see it: ranges, and the delay."""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.tf1.evaluate import Evaluator
from kquant.tf1.values import Values
from kquant.tf_numerics import fake_quantize_range, range_in_force

FIELDS = ("minimum", "maximum", "covered_low", "covered_high", "seen")


def is_waiting(values: Values, mark: dict[str, Any]) -> bool:
    """Whether quantization has not begun yet: the global step is below the step at which it begins."""
    return bool(mark["start_step"]) and int(values.get([mark["step"]])[mark["step"]]) < mark["start_step"]


def field_name(base: str, field: str, site: int) -> str:
    """The name of a variable of a range: one field of one site."""
    return f"{base}/{field}" if not site else f"{base}/{field}_{site}"


class RangeState:
    """One activation range of a quantized graph.

    Args:
        mark: of one of its fake quantizations; all of one range agree but for their site.
        evaluator: of the graph.
    """

    def __init__(self, mark: dict[str, Any], evaluator: Evaluator):
        self.name, self.evaluator, self.values = mark["spec"], evaluator, evaluator.values
        self.bits, self.symmetric, self.nonneg = mark["bits"], mark["symmetric"], mark["nonneg"]
        self.fixed, self.sites, self.base = mark["fixed"], mark["sites"], mark["variables"]
        self._mark = mark

    def _read(self, field: str) -> np.ndarray:
        names = [field_name(self.base, field, i) for i in range(self.sites)]
        found = self.values.get(names)
        return np.array([found[n] for n in names], np.float32).reshape(-1)

    def range(self) -> tuple[np.float32, np.float32]:
        """The float32 range in force, before nudging; `[0, 1]` for a tensor that is constantly zero."""
        if self.fixed is not None:
            return np.float32(self.fixed[0]), np.float32(self.fixed[1])
        bits, symmetric = self.bits, self.symmetric
        low, high = self.evaluator.apply(
            ("range", bits, symmetric),
            lambda low, high: range_in_force(low, high, bits, symmetric),
            [self._read("minimum"), self._read("maximum")],
        )
        return np.float32(low), np.float32(high)

    def is_set(self) -> bool:
        """Whether the range has come from data, or is fixed."""
        return self.fixed is not None or bool(self._read("seen").max() > 0)

    def is_waiting(self) -> bool:
        """Whether quantization has not begun yet."""
        return is_waiting(self.values, self._mark)

    def call(self, values: Any, float_weights: bool = False) -> list[Any]:
        """Fake-quantize one array with the range as it is."""
        x = np.asarray(values[0], np.float32)
        if not self.is_set() or self.is_waiting():
            return [x]
        bits = self.bits
        return self.evaluator.apply(
            ("fake_quant", bits, x.ndim),
            lambda x, low, high: [fake_quantize_range(x, low, high, bits)],
            [x, *map(np.asarray, self.range())],
        )

    def set_frozen(self, value: float) -> None:
        """Let the range stand still (1) or move with the training batches (0)."""
        self.values.set({f"{self.base}/frozen": np.float32(value)})
        self.values.commit()

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
        given = (low, high, *covered, 2.0 if held else 1.0)
        names = [field_name(self.base, f, site) for f in FIELDS]
        self.values.set({n: np.array([v], np.float32) for n, v in zip(names, given, strict=True)})
