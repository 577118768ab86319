"""A TorchScript file that is not the trained model: one number changed in it, and `verify` says so and names the op."""

import json
import re

import numpy as np
import pytest
from small_torch import exported, images

import kquant_torch
from kquant.core.errors import KQuantError
from kquant_torch.archive import decode, encode


@pytest.fixture(scope="module", params=["onednn", "quantized"])
def trained(tmp_path_factory, request):
    qmodel, path = exported(tmp_path_factory.mktemp("verify"), backend=request.param)
    return qmodel, decode(path.read_bytes()), path.with_name("changed.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same for one backend."""
    qmodel, path = exported(tmp_path_factory.mktemp("onednn"))
    return qmodel, decode(path.read_bytes()), path.with_name("changed.pt")


def problems(trained, code=None, tensors=None) -> str:
    """What verify finds in a changed file, in one text; an error counts as well."""
    qmodel, archive, path = trained
    changed = type(archive)(code or archive.code, tensors or archive.tensors, archive.extra)
    path.write_bytes(encode(changed))
    try:
        report = kquant_torch.verify(qmodel, path, images(16).numpy())
    except KQuantError as error:
        return str(error)
    assert report.ok == (not report.problems)
    return "\n".join(report.problems)


def test_the_file_as_written_is_as_trained(trained):
    assert problems(trained) == ""


# op with a kernel: the tensor that it reads
KERNELS = {"relu": "x/quantized", "depth": "relu", "up": "relu#2", "head": "mean"}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("element", [0, -1])
def test_one_weight_code(trained, name, element):
    tensors = dict(trained[1].tensors)
    codes = tensors[f"{name}_kernel"].copy()
    codes.flat[element] += -1 if codes.flat[element] > 0 else 1
    tensors[f"{name}_kernel"] = codes
    assert f"op {name!r}: the kernel" in problems(trained, tensors=tensors)


@pytest.mark.parametrize("name", KERNELS)
def test_one_bias(trained, name):
    """By a tenth of its unit, input scale times weight scale, which no accuracy would show."""
    tensors = dict(trained[1].tensors)
    bias = tensors[f"{name}_bias"].copy()
    described = json.loads(trained[1].extra["kquant.json"])["tensors"].values()
    (scale,) = (tensor["scale"] for tensor in described if tensor["id"] == KERNELS[name])
    bias[1] += np.float32(0.1 * scale * tensors[f"{name}_scale"][1])
    tensors[f"{name}_bias"] = bias
    assert f"op {name!r}: the bias of channel 1" in problems(trained, tensors=tensors)


@pytest.mark.parametrize("name", KERNELS)
def test_one_weight_scale(trained, name):
    tensors = dict(trained[1].tensors)
    scale = tensors[f"{name}_scale"].copy()
    scale[1] *= np.float32(1 + 1e-5)
    tensors[f"{name}_scale"] = scale
    assert f"op {name!r}: the kernel of channel 1" in problems(trained, tensors=tensors)


def changed_number(code: str, statement: str, place: int, change) -> str:
    """The code with the n-th number of a statement's call changed."""
    lines = code.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{statement} = "))
    numbers = list(re.finditer(r"(?<![\w.])-?\d+(\.\d+)?(e-?\d+)?(?![\w.])", lines[at]))
    found = numbers[place]
    text = repr(change(float(found.group()) if "." in found.group() else int(found.group())))
    lines[at] = lines[at][: found.start()] + text + lines[at][found.end() :]
    return "".join(lines)


@pytest.mark.parametrize(
    ("statement", "place", "change", "tensor"),
    [
        ("x_quantized", 0, lambda s: s * (1 + 1e-5), "x/quantized"),  # the scale that it writes
        ("x_quantized", 1, lambda z: z + 1, "x/quantized"),
        ("relu", 0, lambda s: s * (1 + 1e-5), "x/quantized"),  # the scale with which the kernel reads it
        ("head", 1, lambda z: z + 1, "mean"),
        ("mean", 0, lambda s: s * (1 + 1e-5), "max_pool2d"),
    ],
)
def test_one_scale_or_zero_point(trained, statement, place, change, tensor):
    code = changed_number(trained[1].code, statement, place, change)
    assert code != trained[1].code
    assert f"tensor {tensor!r}: scale and zero point" in problems(trained, code=code)


def test_one_entry_of_a_table(trained):
    tensors = dict(trained[1].tensors)
    (name,) = [n for n in tensors if n.endswith("_table")]
    tensors[name] = np.where(np.arange(256) == tensors[name].argmax(), 0, tensors[name]).astype(np.uint8)
    assert "op 'silu' (elementwise by table): max_lsb" in problems(trained, tensors=tensors)


def test_a_kernel_prepacked_for_another_grid(alone):
    code = alone[1].code
    line = next(s for s in code.splitlines() if "self.head_packed = " not in s and "self.depth_packed = " in s)
    changed = code.replace(line, re.sub(r", (\d+), \[", lambda m: f", {int(m[1]) + 1}, [", line, count=1))
    assert "op 'depth': its kernel was prepacked for another input grid" in problems(alone, code=changed)


@pytest.mark.parametrize("trained", ["quantized"], indirect=True)
def test_a_bias_that_is_dropped_when_the_kernel_is_prepacked(trained):
    """Its array is still in the file, as trained."""
    code = trained[1].code
    changed = code.replace("conv2d_prepack(weight, bias,", "conv2d_prepack(weight, None,")
    assert changed != code
    assert "op 'depth' (conv2d): max_lsb" in problems(trained, code=changed)


def test_a_missing_tensor(trained, tmp_path):
    qmodel, archive, path = trained
    extra = {"kquant.json": archive.extra["kquant.json"].replace('"id": "depth"', '"id": "elsewhere"')}
    path.write_bytes(encode(type(archive)(archive.code, archive.tensors, extra)))
    with pytest.raises(KQuantError, match="no tensor named 'depth'"):
        kquant_torch.verify(qmodel, path, images(4).numpy())
