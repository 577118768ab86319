"""The codes and ranges of all twins (`tests/twins.py`) as Keras 3 has them, in a file that torch is held against.

`python -m golden_twins` in `tests`, in the TensorFlow environment, writes it anew. Arrays are channels-last.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import twins

from kquant.core.affine import Affine
from kquant.core.graph import Graph, Op, walk

FILE = pathlib.Path(__file__).parent / "golden_twins.npz"


def markers(graph: Graph) -> list[Op]:
    """The fake quantizations of a graph in order."""
    return [op for op in graph.ops if op.kind == "fake_quant"]


def affine(op: Op) -> Affine:
    """The parameters of a fake quantization."""
    low, high = op.attrs["quantizer"].range()
    return Affine.of_range(np.float32(low), np.float32(high), op.attrs["quantizer"].bits)


def made_by_keras(index: int) -> dict[str, np.ndarray]:
    """Ranges, codes, and the step that made each quantized tensor (-1: the head), in the order of Keras."""
    import kquant
    from kquant import keras3

    x = twins.images(index)
    model, names = twins.in_keras(index)
    config = twins.CONFIGS[index % len(twins.CONFIGS)]
    graph = keras3.read(kquant.quantize_model(model, config, calibration_data=x))
    found: dict[str, np.ndarray] = {}

    def visit(op: Op, inputs: list[Any], outputs: list[Any]) -> None:
        if op.kind == "fake_quant":
            found[f"{index}/{len(found)}"] = affine(op).quantize(np.asarray(outputs[0]))

    walk(graph, {graph.inputs[0]: x}, visit)
    ranges = [op.attrs["quantizer"].range() for op in markers(graph)]
    made_by = [names.get(op.inputs[0].split("#")[0], -1) for op in markers(graph)]
    return {**found, f"{index}/ranges": np.array(ranges, np.float32), f"{index}/steps": np.array(made_by)}


def main() -> None:
    """Write the file."""
    made: dict[str, np.ndarray] = {}
    for index in range(twins.COUNT):
        made |= made_by_keras(index)
    np.savez_compressed(FILE, **made)


if __name__ == "__main__":
    main()
