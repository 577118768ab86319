"""`python -m benchmarks [names] --data FOLDER`: every number beside its bar."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import time

# Before TensorFlow is imported: it reads these once.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

# By the framework that they need; without names, those of the frameworks that are installed run.
BY_FRAMEWORK = {
    "tensorflow": ("speed", "artifact", "accuracy", "fashion", "keras2", "tf1"),
    "torch": ("torch_speed", "torch_artifact", "torch_accuracy"),
}
NAMES = tuple(name for names in BY_FRAMEWORK.values() for name in names)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all of them if none is given")
    parser.add_argument("--data", default=os.environ.get("KQUANT_DATA"), help="folder of models and data sets")
    parser.add_argument("--seeds", type=int, default=3, help="training runs that a mean is taken over")
    parser.add_argument("--quick", action="store_true", help="see that everything runs; its numbers decide nothing")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"names must be of {', '.join(NAMES)}. Received: {', '.join(unknown)}")
    return args


def main() -> int:
    """Runs the benchmarks; the exit status is 1 if a bar is missed."""
    args = arguments()
    from benchmarks.data import Folder, MissingDataError, Settings
    from benchmarks.table import show

    rows = []
    installed = [n for framework, names in BY_FRAMEWORK.items() if importlib.util.find_spec(framework) for n in names]
    for name in args.names or installed:
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"\n{name}: {module.__doc__.splitlines()[0]}", flush=True)
        start = time.perf_counter()
        try:
            rows += show(module.run(Folder(args.data), Settings(args.seeds, args.quick)))
        except MissingDataError as reason:
            print(f"skipped: {reason}")
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    missed = [row.name for row in rows if row.passed is False]
    print(f"\n{sum(row.passed is True for row in rows)} bars met, {len(missed)} missed", *missed, sep="\n  ")
    return 1 if missed and not args.quick else 0


if __name__ == "__main__":
    sys.exit(main())
