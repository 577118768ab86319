"""Reports: what kquant found out, as a table that a person reads and as plain data that a tool reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

WIDEST = 56  # characters; a converter's names run to hundreds
Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]


def cell(value: Any) -> str:
    """How a value stands in a table: `-` for None, yes or no, four significant digits, digits in groups of three.

    Example:
        >>> [cell(v) for v in (None, True, 0.123456, 1234567, ("int8", "int32"))]
        ['-', 'yes', '0.1235', '1,234,567', 'int8, int32']
    """
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(cell, value))
    return str(value)


def clip(text: str, width: int = WIDEST) -> str:
    """`text` without its middle if it is longer than `width` characters.

    Example:
        >>> clip("functional_1/conv2d/BiasAdd", 13)
        'functi…iasAdd'
    """
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - half]}…{text[-half:]}"


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Rows under headers in columns as wide as they need; columns of numbers stand on the right.

    A cell of more than `WIDEST` characters loses its middle.

    Example:
        >>> print(table([("conv", 9), ("dense", 1000)], ("op", "bytes")))
        op     bytes
        -----  -----
        conv       9
        dense  1,000
    """
    values = [list(row) for row in rows]
    texts = [list(headers)] + [[clip(cell(v)) for v in row] for row in values]
    widths = [max(len(row[i]) for row in texts) for i in range(len(headers))]
    numeric = [
        all(v is None or (isinstance(v, int | float | np.number) and not isinstance(v, bool)) for v in column)
        for column in zip(*values, strict=True)
    ] or [False] * len(headers)
    texts.insert(1, ["-" * w for w in widths])
    lines = (
        "  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in zip(row, widths, numeric, strict=True))
        for row in texts
    )
    return "\n".join(line.rstrip() for line in lines)


def plain(value: Any) -> Any:
    """`value` in types that JSON knows: dataclasses and named tuples become dicts, arrays lists, inf and nan strings.

    Example:
        >>> plain((np.float32(0.5), float("inf"), np.arange(2)))
        [0.5, 'inf', [0, 1]]
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class Report:
    """Base of the reports. They are frozen dataclasses: fields are the data, `facts` and `tables` the print-out."""

    title: ClassVar[str] = "report"

    def facts(self) -> list[tuple[str, Any]]:
        """(label, value) pairs that stand at the top."""
        return []

    def tables(self) -> list[Table]:
        """(title, headers, rows) of the tables that follow; a table without rows is left out."""
        return []

    def __str__(self) -> str:
        width = max((len(label) for label, _ in self.facts()), default=0)
        parts = ["\n".join([self.title] + [f"  {label.ljust(width)}  {cell(value)}" for label, value in self.facts()])]
        parts += [f"{title}\n{table(rows, headers)}" for title, headers, rows in self.tables() if rows]
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data: dicts, lists, numbers and strings, ready for `json.dumps`."""
        data: dict[str, Any] = plain(self)
        return data


class AuditOp(NamedTuple):
    """One op of an artifact: `bytes` are its constants', `weight_bits` None for an op without weights."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    granularity: str
    weight_bits: int | None
    bytes: int
    macs: int


class FloatOp(NamedTuple):
    """What keeps an artifact from being fully integer, and why."""

    name: str
    kind: str
    cause: str


@dataclass(frozen=True)
class AuditReport(Report):
    """What an artifact's file holds, found without running it.

    Args:
        path: the file.
        fully_integer: no float tensor except model inputs and outputs touched only by a boundary QUANTIZE or
            DEQUANTIZE; no custom or flex op.
        integer_mac_fraction: the share of the multiply-accumulates that run on integer activations and weights, 0..1;
            without any, 1 for a fully integer file, else 0.
        float_ops: what is not integer, each with its cause.
        ops: a row per op: name, kind, input dtypes, output dtype, granularity, weight bits, constants' bytes, MACs.
        op_counts: ops by kind.
        macs: multiply-accumulates at batch 1.
        file_bytes: size of the file.
        least_runtime: the least version of the runtime that has every op in its version.
        runtime: what runs the file.
    """

    title: ClassVar[str] = "Audit"

    path: str
    fully_integer: bool
    integer_mac_fraction: float
    float_ops: list[FloatOp]
    ops: list[AuditOp]
    macs: int
    file_bytes: int
    least_runtime: str
    op_counts: dict[str, int] = field(default_factory=dict)
    runtime: str = "TFLite"

    def facts(self) -> list[tuple[str, Any]]:
        """The verdict, the share of integer MACs, sizes, and ops by kind."""
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(self.op_counts.items(), key=lambda kv: (-kv[1], kv[0])))
        return [
            ("file", self.path),
            ("fully integer", self.fully_integer),
            ("integer MACs", f"{self.integer_mac_fraction:.2%} of {self.macs:,}"),
            ("file bytes", self.file_bytes),
            ("least runtime", f"{self.runtime} {self.least_runtime}"),
            ("ops", counts),
        ]

    def tables(self) -> list[Table]:
        """What is not integer, then every op."""
        heads = ("name", "kind", "inputs", "output", "granularity", "weight bits", "bytes", "MACs")
        return [("Not integer", ("name", "kind", "cause"), self.float_ops), ("Ops", heads, self.ops)]


@dataclass(frozen=True)
class ExportReport(Report):
    """What an export wrote.

    Args:
        path: the file.
        file_bytes: its size.
        fully_integer: see `AuditReport`.
        ops: number of ops in the file.
        floats: why ops stayed float, by op; empty unless float ops were allowed.
        least_runtime: the least version of the runtime that has every op in its version.
        seconds: time of the export.
        runtime: what runs the file.
        portable: whether CPUs without VNNI give the same values; None where that makes no difference.
    """

    title: ClassVar[str] = "Export"

    path: str
    file_bytes: int
    fully_integer: bool
    ops: int
    floats: dict[str, str]
    least_runtime: str
    seconds: float
    runtime: str = "TFLite"
    portable: bool | None = None

    def facts(self) -> list[tuple[str, Any]]:
        """What was written."""
        return [
            ("file", self.path),
            ("bytes", self.file_bytes),
            ("fully integer", self.fully_integer),
            ("ops", self.ops),
            ("least runtime", f"{self.runtime} {self.least_runtime}"),
            ("seconds", self.seconds),
            *([] if self.portable is None else [("portable to CPUs without VNNI", self.portable)]),
        ]

    def tables(self) -> list[Table]:
        """Ops that stayed float."""
        return [("Float ops", ("op", "why"), list(self.floats.items()))]
