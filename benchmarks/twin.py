"""One network, one set of weights and ranges, as `.tflite` and as TorchScript: op by op, and on the test images.

The two frameworks live in environments of their own and meet in a folder:

    (torch)       python -m benchmarks.twin torch --data FOLDER --out TWIN
    (TensorFlow)  python -m benchmarks.twin keras --data FOLDER --out TWIN
    (torch)       python -m benchmarks.twin compare --data FOLDER --out TWIN

Each op of the TorchScript artifact runs on the integers that the `.tflite` file's op read, and their results compared.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.data import Folder
from benchmarks.table import Row, show

COMPARED = 64  # images whose every tensor is compared
WIDTHS = ((16, 1), (32, 2), (64, 2))  # channels and stride of the three stages, of three blocks each
MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))
TOP1, APART = 0.995, 1.0


def images(folder: Folder) -> np.ndarray:
    """The test images as the network takes them, float32 (n, 32, 32, 3)."""
    with np.load(folder.find("cifar10_jpg_dev.npz")) as file:
        return (file["x_test"].astype(np.float32) / 255 - MEAN) / STD


def write_torch(folder: Folder, out: pathlib.Path) -> Iterator[Row]:
    """The calibrated network in torch: its artifact, and what its twin needs."""
    import kquant_torch
    from benchmarks.torch_resnet import normalized, pretrained
    from kquant_torch.read import read

    model = pretrained(folder.find("resnet20_jpgft_float.pt"))
    with np.load(folder.find("cifar10_jpg_dev.npz")) as file:
        samples = normalized(file["x_train"][:256])
    qmodel = kquant_torch.wrap(model, example_inputs=samples[:2], calibration_data=samples).eval()
    report = kquant_torch.export_torchscript(qmodel, out / "twin.pt", example_inputs=samples[:2])
    quantizers = [op.attrs["quantizer"] for op in read(qmodel).ops if op.kind == "fake_quant"]
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(out / "torch.npz", ranges=np.array([q.range() for q in quantizers], np.float32), **arrays)
    yield Row("TorchScript artifact, bytes", report.file_bytes)


def keras_twin(arrays: Any) -> Any:
    """ResNet-20 in Keras 3 with the weights of the torch one."""
    from keras import Input, Model, layers, ops

    def conv(x: Any, name: str, stride: int, relu: bool) -> Any:
        place, norm = name.rsplit(".", 1)[0] + "." if "." in name else "", name[-1]
        kernel = arrays[f"{name}.weight"].transpose(2, 3, 1, 0)
        if stride > 1:  # torch pads one on either side, and "same" would pad on one
            x = layers.ZeroPadding2D(1, name=f"{name}_pad".replace(".", "_"))(x)
        layer = layers.Conv2D(
            kernel.shape[-1], 3, stride, "valid" if stride > 1 else "same", use_bias=False, name=name.replace(".", "_")
        )
        x = layer(x)
        layer.set_weights([kernel])
        after = layers.BatchNormalization(epsilon=1e-5, name=f"{place}bn{norm}".replace(".", "_"))
        x = after(x)
        roles = ("weight", "bias", "running_mean", "running_var")
        after.set_weights([arrays[f"{place}bn{norm}.{role}"] for role in roles])
        return ops.relu(x) if relu else x

    x = source = Input((32, 32, 3), name="x")
    x = conv(x, "conv1", 1, True)
    for stage, (width, first) in enumerate(WIDTHS, 1):
        for block in range(3):
            stride = first if block == 0 else 1
            y = conv(x, f"layer{stage}.{block}.conv1", stride, True)
            y = conv(y, f"layer{stage}.{block}.conv2", 1, False)
            if stride > 1:
                x = x[:, ::2, ::2, :]
                x = ops.pad(x, [[0, 0], [0, 0], [0, 0], [width // 4, width // 4]])
            x = ops.relu(y + x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    head = layers.Dense(10, name="linear")
    y = head(x)
    head.set_weights([arrays["linear.weight"].T, arrays["linear.bias"]])
    return Model(source, y, name="twin")


def write_keras(folder: Folder, out: pathlib.Path) -> Iterator[Row]:
    """The twin in Keras with the ranges of the torch one: its artifact, all its integers and its outputs."""
    import kquant
    from kquant.keras3 import read
    from kquant.tflite.export import integer_model
    from kquant.tflite.run import run_all

    with np.load(out / "torch.npz") as file:
        arrays = {name: file[name] for name in file.files}
    qmodel = kquant.quantize_model(keras_twin(arrays))
    quantizers = [op.attrs for op in read(qmodel).ops if op.kind == "fake_quant"]
    ranges = {id(a["quantizer"]): a for a in quantizers}
    given = list(dict.fromkeys(map(tuple, arrays["ranges"])))
    if len(ranges) != len(given):
        raise SystemExit(f"as many ranges in both expected. Received: {len(ranges)} and {len(given)}")
    for attrs, (low, high) in zip(ranges.values(), given, strict=True):
        attrs["quantizer"].set_range(np.float32(low), np.float32(high), attrs["site"])
    report = kquant.export_tflite(qmodel, out / "twin.tflite")
    x = images(folder)
    model = integer_model(qmodel)
    raw = run_all((out / "twin.tflite").read_bytes(), x[:COMPARED])
    kept = [(op.kind, raw[op.outputs[0]]) for op in model.ops if op.outputs[0] in raw]
    artifact = kquant.load_artifact(out / "twin.tflite")
    tensors = {f"{i}:{kind}": codes for i, (kind, codes) in enumerate(kept)}
    np.savez(out / "keras.npz", outputs=artifact(x), **tensors)
    yield Row(".tflite artifact, bytes", report.file_bytes)


def in_torch_layout(codes: np.ndarray) -> np.ndarray:
    """Codes of the integer model as uint8, channels first."""
    unsigned = (codes.astype(np.int16) + 128).astype(np.uint8)
    return np.ascontiguousarray(unsigned.transpose(0, 3, 1, 2)) if codes.ndim == 4 else unsigned


def compare(folder: Folder, out: pathlib.Path) -> Iterator[Row]:
    """Each op of the TorchScript artifact on the integers of the `.tflite` file, and both on all images."""
    import kquant_torch
    from kquant_torch.run import run_each

    with np.load(out / "keras.npz") as file:
        theirs = {name: file[name] for name in file.files}
    outputs = theirs.pop("outputs")
    # Ops that only move codes stand at other places in the two: what is compared is what computes.
    kinds = ("quantize", "conv2d", "add", "mean", "dense")
    computed = [codes for name, codes in theirs.items() if name.split(":")[1] in kinds]
    x = images(folder).transpose(0, 3, 1, 2)
    data = (out / "twin.pt").read_bytes()
    wanted = ("quantize", "qconv_pointwise", "qconv2d_pointwise", "mean", "qlinear_pointwise")
    apart = run_each(data, [np.ascontiguousarray(x[:COMPARED])], wanted, [in_torch_layout(c) for c in computed])
    apart = [(a.astype(int), b.reshape(a.shape)) for a, b in apart]  # one mean keeps its axes, the other does not
    worst = max(int(np.abs(a - b).max()) for a, b in apart)
    share = sum(int((a != b).sum()) for a, b in apart) / sum(a.size for a, _ in apart)
    detail = f"{share:.3%} of the codes, {len(apart)} ops, {COMPARED} images"
    yield Row("op by op on equal integers, codes apart", worst, APART, detail=detail)
    artifact = kquant_torch.load_artifact(out / "twin.pt")
    ours = np.concatenate([artifact(np.ascontiguousarray(x[i : i + 100])) for i in range(0, len(x), 100)])
    same = float((ours.argmax(1) == outputs.argmax(1)).mean())
    yield Row("top-1 of both artifacts equal, share of images", same, TOP1, at_most=False, detail=f"{len(x)} images")
    step = np.diff(np.unique(ours)).min()
    largest = float(np.abs(ours - outputs).max() / step)
    yield Row("end to end, largest difference in output codes", largest, detail=f"an output code is {step:.4f}")


def main() -> int:
    """One of the three steps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.twin", description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("torch", "keras", "compare"))
    parser.add_argument("--data", required=True, help="folder of models and data sets")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder in which the steps meet")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    steps = {"torch": write_torch, "keras": write_keras, "compare": compare}
    rows = show(steps[args.step](Folder(args.data), args.out))
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
