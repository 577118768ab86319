"""The artifact against the TensorFlow converter's own full-integer PTQ of the same float model: latency, size, cost."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Iterator

from ai_edge_litert.interpreter import Interpreter

import kquant
from benchmarks.data import Folder, Settings
from benchmarks.imagenet import ARCHITECTURES, images, random_model
from benchmarks.one_export import in_new_process
from benchmarks.statistics import interleave, ratio
from benchmarks.table import Row

LATENCY, SIZE, INT4_SIZE, EXPORT_TIME, EXPORT_MEMORY = 1.05, 1.02, 0.60, 1.5, 1.5
BLOCK_SECONDS = 0.4
MIB = 2**20


def invocation(path: pathlib.Path) -> Callable[[], object]:
    """One inference on one thread, its input already in place."""
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images(1, seed=2))
    for _ in range(3):
        interpreter.invoke()
    return interpreter.invoke


def latency(name: str, ours: pathlib.Path, theirs: pathlib.Path, rounds: int) -> Row:
    """The ratio of latencies."""
    sides = [invocation(theirs), invocation(ours)]
    once = min(interleave(sides, 3)[0])
    found = ratio(*interleave(sides, rounds, max(1, round(BLOCK_SECONDS / once))))
    detail = f"{found}; converter {1e3 * found.reference:.2f} ms, kquant {1e3 * found.other:.2f} ms"
    return Row(f"{name}: latency, kquant / converter", found.median, LATENCY, detail=detail)


def sizes(name: str, files: dict[str, pathlib.Path]) -> Iterator[Row]:
    """The ratios of file sizes."""
    size = {side: path.stat().st_size for side, path in files.items()}
    detail = f"{size['kquant']:,} B against {size['converter']:,} B"
    yield Row(f"{name}: size, kquant / converter", size["kquant"] / size["converter"], SIZE, detail=detail)
    detail = f"{size['kquant-int4']:,} B against {size['kquant']:,} B"
    yield Row(f"{name}: size, int4 weights / int8", size["kquant-int4"] / size["kquant"], INT4_SIZE, detail=detail)


def cost(name: str, runs: dict[str, list[dict[str, float]]]) -> Iterator[Row]:
    """The ratios of export time and peak memory, each run in a process of its own."""

    def of(side: str, key: str) -> list[float]:
        return [run[key] for run in runs[side]]

    alone = ratio(of("converter", "export"), of("kquant", "export"))
    detail = f"{alone}; converter {alone.reference:.1f} s, kquant {alone.other:.2f} s"
    yield Row(f"{name}: export_tflite / conversion, time", alone.median, EXPORT_TIME, detail=detail)
    whole = ratio(of("converter", "everything"), of("kquant", "everything"))
    detail = f"{whole}; kquant {whole.other:.1f} s"
    yield Row(f"{name}: quantize, calibrate and export / conversion", whole.median, detail=detail)
    peak = ratio(of("converter", "peak"), of("kquant", "peak"))
    detail = f"{peak}; converter {peak.reference:.0f} MiB, kquant {peak.other:.0f} MiB, from loading to file"
    yield Row(f"{name}: peak memory, kquant / converter", peak.median, EXPORT_MEMORY, detail=detail)


def run(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The rows of this benchmark; it needs no data."""
    for name in list(ARCHITECTURES)[: 1 if settings.quick else None]:
        with tempfile.TemporaryDirectory() as scratch:
            place = pathlib.Path(scratch)
            source = place / "float.keras"
            random_model(name).save(source)
            files = {side: place / f"{side}.tflite" for side in ("kquant", "converter", "kquant-int4")}
            in_new_process("kquant-int4", source, files["kquant-int4"])
            runs: dict[str, list[dict[str, float]]] = {"kquant": [], "converter": []}
            for index in range(1 if settings.quick else 5):
                for side in list(runs)[:: 1 if index % 2 else -1]:
                    runs[side].append(in_new_process(side, source, files[side]))
            for side in ("kquant", "kquant-int4"):
                report = kquant.audit(files[side])
                yield Row(f"{name}: {side} fully integer", float(report.fully_integer), 1.0, at_most=False)
            yield latency(name, files["kquant"], files["converter"], 5 if settings.quick else 21)
            yield from sizes(name, files)
            yield from cost(name, runs)
