"""Handwritten digits, from a float model to integer files: train, quantize, fine-tune, export, run, compare.

    python -m examples.digits [--framework keras|torch] [--out FOLDER] [--epochs N]

The data are the 1,797 digits that come with scikit-learn, so nothing is downloaded. In the table, `calibrated` is the
accuracy of the quantized model before any training and `accuracy` that of the written file after fine-tuning, both on
the 450 test images; `latency` is the median time of one image on one thread; `max_lsb` is how far, in output codes, an
op of the file is at most from the trained op before rounding, 0.5 being perfect rounding. What differs by framework
stands in `examples.digits_keras3` and `examples.digits_torch`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

SEED = 0
FRAMEWORKS = {"keras": "examples.digits_keras3", "torch": "examples.digits_torch"}


@dataclass(frozen=True)
class Recipe:
    """One quantized model: what to call it, its quantizer and config, and how it is fine-tuned.

    `longer` multiplies the epochs: a binary network has further to go from its float weights than an 8-bit one.
    """

    label: str
    quantizer: str
    config: list[dict[str, Any]] | None = None
    learning_rate: float = 1e-3
    longer: int = 1


RECIPES = (
    Recipe("Naive 8-bit", "NaiveQuantizer"),
    Recipe("QAT 8-bit", "QAT_Quantizer"),
    Recipe("QAT W4A8", "QAT_Quantizer", [{"q_bits": {"weight": 4, "output": 8}, "op_types": ["default"]}]),
    Recipe("QAT W4A4", "QAT_Quantizer", [{"q_bits": 4, "op_types": ["default"]}]),
    Recipe(
        "DoReFa W1A2",
        "DoReFaQuantizer",
        [
            {"q_bits": {"weight": 1, "output": 2}, "op_types": ["default"]},
            {"q_bits": {"weight": 8, "output": 2}, "op_names": "stem"},  # the first and the last layer: 8-bit weights
            {"q_bits": 8, "op_names": ["pool", "logits"]},
        ],
        learning_rate=2e-3,
        longer=4,
    ),
)


@dataclass(frozen=True)
class Row:
    """A line of the table. Accuracies are shares, sizes bytes, times microseconds."""

    label: str
    calibrated: float | None
    accuracy: float
    file: str
    size: int
    latency: float
    max_lsb: float | None
    fully_integer: bool


def digits() -> tuple[Any, Any, Any, Any]:
    """Images (n, 8, 8, 1) in 0..1 and their labels: 1,347 to train with and 450 to test with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=450, stratify=labels, random_state=SEED)
    return x, y, x_test, y_test


def latencies(runs: Sequence[Callable[[], Any]], rounds: int = 15, times: int = 40) -> list[float]:
    """The median time of each run, in microseconds; they take turns."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run_once, own in zip(runs, taken, strict=True):
            for _ in range(times):
                start = time.perf_counter()
                run_once()
                own.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(own) for own in taken]


def run(framework: ModuleType, out: pathlib.Path, epochs: int) -> list[Row]:
    """Train, quantize, export and measure everything; returns the table's rows."""
    kquant = framework.load(SEED)
    from tqdm import tqdm

    warnings.filterwarnings("ignore", "DoReFa clips activations")  # it says to train, which is what we do
    x, y, x_test, y_test = framework.arranged(*digits())

    def accuracy(model: Any) -> float:
        return float((framework.logits(model, x_test).argmax(-1) == y_test).mean())

    float_epochs = 3 * epochs
    total = float_epochs + sum(recipe.longer * epochs for recipe in RECIPES)
    with tqdm(total=total, unit="epoch", mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        bar.set_description("Float".ljust(11))
        model = framework.small_cnn()
        framework.fit(model, x, y, float_epochs, 3e-3, bar.update)
        file = f"float{framework.SUFFIX}"
        framework.write_float(model, out / file, x_test[:1])
        found: list[dict[str, Any]] = [{"label": "Float", "calibrated": None, "file": file, "max_lsb": None}]
        for recipe in RECIPES:
            bar.set_description(recipe.label.ljust(11))
            quantizer = getattr(kquant, recipe.quantizer)(recipe.config)
            qmodel = framework.quantized(quantizer, model, x[:200])
            before = accuracy(qmodel)
            framework.fit(qmodel, x, y, recipe.longer * epochs, recipe.learning_rate, bar.update, controlled=True)
            file = recipe.label.lower().replace(" ", "_") + framework.SUFFIX
            parity = framework.exported(qmodel, out / file, x_test)
            if not parity.ok:
                bar.write(f"{recipe.label}: {'; '.join(parity.problems)}", file=sys.stderr)
            found.append({"label": recipe.label, "calibrated": before, "file": file, "max_lsb": parity.max_lsb})
    paths = [out / facts["file"] for facts in found]
    times = latencies([framework.runner(path, x_test[:1]) for path in paths])
    return [
        Row(
            accuracy=accuracy(framework.artifact(path)), size=path.stat().st_size, latency=latency,
            fully_integer=framework.fully_integer(path), **facts,
        )
        for facts, path, latency in zip(found, paths, times, strict=True)
    ]  # fmt: skip


def as_text(rows: Sequence[Row]) -> str:
    """The table."""
    from kquant.core.reports import table

    def percent(share: float | None) -> str:
        return "     -" if share is None else f"{share:6.1%}"

    lines = [
        (
            row.label,
            percent(row.calibrated),
            percent(row.accuracy),
            f"{row.size / 1024:6.1f} kB",
            f"{row.latency:5.0f} µs",
            "     -" if row.max_lsb is None else f"{row.max_lsb:.4f}",
            row.fully_integer,
            row.file,
        )
        for row in rows
    ]
    return table(lines, ("model", "calibrated", "accuracy", "size", "latency", "max_lsb", "fully integer", "file"))


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Accuracy before and after fine-tuning, and file size, a line per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), sharey=True, width_ratios=[3, 2], constrained_layout=True
    )
    draw_accuracy(left, rows)
    sizes = [row.size / 1024 for row in rows]
    bars = right.barh(range(len(rows)), sizes, height=0.5, color="#8fa3b3")
    right.bar_label(bars, [f"{row.size / 1024:.0f} kB, {row.latency:.0f} µs" for row in rows], padding=5)
    right.set(xlim=(0, 1.4 * max(sizes)), xlabel="file size in kB, and the time of one image")
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_accuracy(axes: Any, rows: Sequence[Row]) -> None:
    """A point per file; a ring, or an arrow where it would lie off the scale, for its model before training."""
    blue, pale, dot = "#1b6ca8", "#a9c3d9", 80
    least = 100 * min(row.accuracy for row in rows)
    low, high = least - max(1.0, 0.6 * (100 - least)), 100.0
    span = high - low
    for line, row in enumerate(rows):
        value, before = 100 * row.accuracy, row.calibrated and 100 * row.calibrated
        if before is not None:
            start = max(before, low)
            axes.plot([start, value], [line, line], color=pale, linewidth=3, zorder=1)
            shape = "o" if before >= low else "<"
            axes.scatter(
                start, line, s=2 * dot, marker=shape, facecolor="white", edgecolor=blue, linewidth=1.5, zorder=2
            )
            if before < low:
                axes.annotate(f"{before:.1f} %", (start, line), (0, 9), textcoords="offset points", color=blue)
        axes.scatter(value, line, s=dot, color=blue, zorder=3)
        axes.annotate(f"{value:.1f} %", (high + 0.06 * span, line), va="center", annotation_clip=False)
    axes.set(xlim=(low - 0.04 * span, high + 0.22 * span), xlabel="accuracy on the 450 test images, in %")
    axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= high])
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.scatter(
        [], [], s=2 * dot, facecolor="white", edgecolor=blue, linewidth=1.5, label="calibrated, not yet trained"
    )
    axes.scatter([], [], s=dot, color=blue, label="the written file, fine-tuned")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; a folder that cannot be written to is refused before anything takes time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=FRAMEWORKS, default="keras", help="what to train in (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default="kquant_demo", help="folder for the results (%(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=5, help="of fine-tuning; float training has 3 times as many (%(default)s)"
    )
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error(f"--epochs: expected 1 or more. Received: {options.epochs}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        probe = options.out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"--out: expected a folder that can be written to. Received: {options.out} ({error.strerror})")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = arguments(argv)
    start = time.perf_counter()
    try:
        rows = run(importlib.import_module(FRAMEWORKS[options.framework]), options.out, options.epochs)
        print(f"\n{as_text(rows)}\n")
        (options.out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        draw(rows, options.out / "results.png")
    except KeyboardInterrupt:
        print(f"\nStopped. The files that were finished are in {options.out.resolve()}", file=sys.stderr)
        return 130
    print(
        f"{time.perf_counter() - start:.0f} s. The files, results.json and results.png are in {options.out.resolve()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
