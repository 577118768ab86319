"""One export in a process of its own: its time and peak memory. `python -m benchmarks.one_export SIDE MODEL FILE`."""

from __future__ import annotations

import json
import pathlib
import resource
import subprocess
import sys
import time

SIDES = ("kquant", "kquant-int4", "converter")
SAMPLES = 8  # images that both sides calibrate on
INT4 = [{"q_bits": {"weight": 4, "output": 8}, "op_types": ["default"]}]


def export(side: str, source: str, target: str) -> dict[str, float]:
    """Quantize, calibrate and export a saved float model.

    Returns:
        Seconds of `export` alone (for the converter: of its whole conversion, calibration included), seconds of
        `everything` after loading, and the process's `peak` memory in MiB.
    """
    import keras

    from benchmarks.imagenet import converter_ptq, images

    model, samples = keras.models.load_model(source), images(SAMPLES, seed=1)
    start = time.perf_counter()
    if side == "converter":
        exporting = start
        pathlib.Path(target).write_bytes(converter_ptq(model, samples))
    else:
        import kquant

        quantized = kquant.quantize_model(model, INT4 if side == "kquant-int4" else None, calibration_data=samples)
        exporting = time.perf_counter()
        kquant.export_tflite(quantized, target)
    end = time.perf_counter()
    return {"export": end - exporting, "everything": end - start, "peak": peak_memory()}


def peak_memory() -> float:
    """The most memory that this process has held, in MiB.

    On Linux `ru_maxrss` of a new process starts at what the process that launched it held (it is kept across exec), so
    the high-water mark of its own address space is read instead. See proc(5), VmHWM.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        marks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if marks:
            return int(marks[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def in_new_process(side: str, source: pathlib.Path, target: pathlib.Path) -> dict[str, float]:
    """`export` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.one_export", side, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(export(*sys.argv[1:4])))
