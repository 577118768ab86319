"""Chooses the recipe of `finetune` on held-out training images: `python -m benchmarks.tune --data FOLDER`.

The last 1,000 of the 6,000 training images are held out of the quantized training; the 2,000 that `accuracy` measures
on are not touched. The float model has seen all 6,000, so that only the order of the recipes means something here.
"""

from __future__ import annotations

import argparse
import itertools
import os

import kquant
from benchmarks.accuracy import BITS, CALIBRATION
from benchmarks.data import Folder
from benchmarks.finetune import Recipe, finetune
from benchmarks.measure import classes

HELD_OUT = 1000


def main() -> None:
    """Prints the held-out agreement with the float model of every recipe."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("KQUANT_DATA"))
    parser.add_argument("--bits", choices=BITS, default="W4A4")
    args = parser.parse_args()
    folder = Folder(args.data)
    images, _ = folder.cifar("train")
    x, held = images[:-HELD_OUT], images[-HELD_OUT:]
    model = folder.model("resnet8_jpgft_float.keras")
    wanted = classes(model, held)
    for rate, features, ranges, shift in itertools.product((3e-4, 1e-3, 2e-3), (0.0, 3.0, 10.0), (False, True), (0, 2)):
        recipe = Recipe(rate, features, ranges, shift)
        qmodel = kquant.quantize_model(model, BITS[args.bits], calibration_data=x[:CALIBRATION])
        finetune(qmodel, model, x, recipe, seed=0)
        print(f"{100 * (classes(qmodel, held) == wanted).mean():.2f}  {recipe}", flush=True)


if __name__ == "__main__":
    main()
