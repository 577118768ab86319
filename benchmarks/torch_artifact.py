"""The TorchScript artifact against float eager and against what torch.ao's FX flow converts: time, size, agreement."""

from __future__ import annotations

import contextlib
import copy
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

import kquant_torch
from benchmarks.data import Folder, Settings
from benchmarks.statistics import interleave, paired_difference, ratio
from benchmarks.table import Row
from benchmarks.torch_resnet import normalized, pretrained
from benchmarks.torch_resnet50 import random_model

# The ways to a file: target of the training, backend of the file, engine of its kernels, whether bars are set for it.
WAYS = {
    "onednn": ("onednn", "onednn", "x86", True),
    "onednn_fused": ("onednn_fused", "onednn", "x86", True),
    "quantized on fbgemm": ("onednn", "quantized", "fbgemm", False),
    "quantized on qnnpack": ("onednn", "quantized", "qnnpack", False),
}
# The bar for AMX is 3; it needs a CPU that has it.
FASTER, AGAINST_FX, SIZE = 2.0, 1.15, 0.30
AGREEMENT, DROP = 0.98, 0.4
BLOCK_SECONDS = 0.5
BATCHES = {"ResNet-20": (1, 32), "ResNet-50": (1,)}


def fx_converted(model: nn.Module, data: torch.Tensor) -> nn.Module:
    """torch.ao's FX flow with its x86 settings, calibrated on the same data."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (data[:1],))
        prepared(data)
        return convert_fx(prepared)


def timed(sides: dict[str, Callable[[torch.Tensor], object]], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each side, one per round, interleaved."""
    calls = [lambda f=f: f(x) for f in sides.values()]
    for call in calls:
        call()
    once = max(interleave(calls, 3)[0])
    return dict(zip(sides, interleave(calls, rounds, max(1, round(BLOCK_SECONDS / once))), strict=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the announcements that TorchScript and quantized tensors are deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        yield


def loaded(paths: dict[str, pathlib.Path]) -> dict[str, Callable[[torch.Tensor], object]]:
    """The artifacts, each prepacked for its engine."""
    made = {}
    for way, path in paths.items():
        torch.backends.quantized.engine = WAYS[way][2]
        with quiet():
            made[way] = torch.jit.load(path).eval()
    torch.backends.quantized.engine = "x86"
    return made


def latencies(
    name: str, model: nn.Module, paths: dict[str, pathlib.Path], data: torch.Tensor, settings: Settings
) -> Iterator[Row]:
    """The ratios of latencies on one thread; the input is channels_last for all."""
    torch.set_num_threads(1)
    eager = copy.deepcopy(model).to(memory_format=torch.channels_last)
    sides = {"float": eager, "fx": fx_converted(model, data), **loaded(paths)}
    for batch in BATCHES[name]:
        x = data[:batch].contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), quiet():
            seconds = timed(sides, x, 5 if settings.quick else 11)
        times = ", ".join(f"{side} {1e3 * float(np.median(s)):.2f} ms" for side, s in seconds.items())
        for way in paths:
            faster, slower = ratio(seconds[way], seconds["float"]), ratio(seconds["fx"], seconds[way])
            bars = (FASTER, AGAINST_FX) if WAYS[way][3] else (None, None)
            where = f"{name}, {way}, batch {batch}"
            yield Row(f"{where}: float / artifact, time", faster.median, bars[0], False, "x", f"{faster}; {times}")
            yield Row(f"{where}: artifact / FX, time", slower.median, bars[1], True, "x", str(slower))


def size(name: str, way: str, model: nn.Module, path: pathlib.Path) -> Row:
    """The file against the float state_dict as torch saves it."""
    with tempfile.TemporaryDirectory() as scratch:
        state = pathlib.Path(scratch) / "state.pt"
        torch.save(model.state_dict(), state)
        whole, made = state.stat().st_size, path.stat().st_size
    return Row(f"{name}, {way}: file / float state_dict", made / whole, SIZE, detail=f"{made:,} B against {whole:,} B")


def accuracy(way: str, model: nn.Module, path: pathlib.Path, data: dict[str, np.ndarray]) -> Iterator[Row]:
    """Agreement with float and drop on the test images, calibrated only."""
    artifact, parts = kquant_torch.load_artifact(path), normalized(data["x_test"]).split(100)
    with torch.no_grad():
        real = torch.cat([model(x) for x in parts]).argmax(1).numpy()
    made = torch.cat([artifact(x) for x in parts]).argmax(1).numpy()
    labels = data["y_test"]
    name = f"ResNet-20, {way}, calibrated W8A8"
    yield Row(f"{name}: agreement with float", float((real == made).mean()), AGREEMENT, at_most=False)
    gain = paired_difference(real == labels, made == labels)
    yield Row(f"{name}: drop in points", -gain.points, DROP, detail=f"gain {gain}")


def exported(name: str, way: str, model: nn.Module, images: torch.Tensor, path: pathlib.Path) -> Iterator[Row]:
    """Writes the file of one way, with its rows of size and parity."""
    target, backend, engine, _ = WAYS[way]
    torch.backends.quantized.engine = engine
    qmodel = kquant_torch.wrap(model, example_inputs=images[:2], calibration_data=images, target=target).eval()
    kquant_torch.export_torchscript(qmodel, path, example_inputs=images[:2], backend=backend)
    integer = kquant_torch.audit(path).integer_mac_fraction
    yield Row(f"{name}, {way}: share of integer MACs", integer, 1.0, at_most=False)
    parity = kquant_torch.verify(qmodel, path, images[: 4 if name == "ResNet-50" else 32].numpy())
    yield Row(f"{name}, {way}: max_lsb", parity.max_lsb, 0.6, detail=f"mean error {parity.mean_error:+.4f} codes")
    yield size(name, way, model, path)


def run(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The rows of this benchmark; the ResNet-50 shape has random weights and needs no data."""
    with np.load(folder.find("cifar10_jpg_dev.npz")) as file:
        data = {k: file[k] for k in file.files}
    small = pretrained(folder.find("resnet20_jpgft_float.pt"))
    nets = {"ResNet-20": (small, normalized(data["x_train"][:256]))}
    if not settings.quick:
        nets["ResNet-50"] = (random_model(), torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1)))
    for name, (model, images) in nets.items():
        with tempfile.TemporaryDirectory() as scratch:
            paths = {}
            for way in WAYS:
                paths[way] = pathlib.Path(scratch) / f"{way}.pt"
                yield from exported(name, way, model, images, paths[way])
                if name == "ResNet-20":
                    yield from accuracy(way, model, paths[way], data)
            yield from latencies(name, model, paths, images, settings)
