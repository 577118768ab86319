"""The TorchScript file: what stock torch makes of it, its options, its bytes, and what is refused."""

import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from small_torch import Net, exported, images, trained

import kquant_torch
from kquant.core.errors import ArtifactError, ExportError, ModelError
from kquant_torch.archive import Archive, decode, encode

# torch 2.13 writes this once to stderr when it makes a quantized tensor; Python's warnings do not see it.
QUANTIZED_TENSORS = "Quantizer.cpp:111] Warning: torch.quantize_per_tensor, torch.quantize_per_channel"
ALONE = """
import sys, warnings
sys.path = [p for p in sys.path if p not in ("", {root!r})]
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("kquant", "kquant_torch", "tensorflow", "keras"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
import torch
{body}
"""


def alone(body: str, **environment: str) -> str:
    """What a program prints in a fresh interpreter that cannot import this project."""
    root = str(pathlib.Path(kquant_torch.__file__).resolve().parent.parent)
    code = ALONE.format(root=root, body=textwrap.dedent(body))
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**kept, **environment}, cwd="/"
    )
    assert made.returncode == 0, made.stderr
    kept = [line for line in made.stderr.splitlines() if QUANTIZED_TENSORS not in line]
    assert "Warning" not in "\n".join(kept), made.stderr
    return made.stdout


@pytest.mark.parametrize(
    ("target", "backend", "engine"),
    [
        ("onednn", "onednn", "x86"),
        ("onednn_fused", "onednn", "x86"),
        ("onednn", "quantized", "fbgemm"),
        ("onednn", "quantized", "qnnpack"),
    ],
)
def test_it_runs_where_the_project_is_not_installed(tmp_path, target, backend, engine, quantized_engine):
    _, path = exported(tmp_path, target=target, backend=backend)
    quantized_engine(engine)
    expected = kquant_torch.load_artifact(path)(images())
    torch.save(images(), tmp_path / "x.pt")
    out = alone(f"""
        try:
            import kquant_torch
        except ImportError:
            print("absent")
        torch.backends.quantized.engine = {engine!r}
        x = torch.load({str(tmp_path / "x.pt")!r}, weights_only=True)
        module = torch.jit.load({str(path)!r}).eval()
        torch.save(module(x), {str(tmp_path / "y.pt")!r})
        frozen = torch.jit.freeze(module)
        print(torch.equal(frozen(x), module(x)))
        module.save({str(tmp_path / "again.pt")!r})
        print(torch.equal(torch.jit.load({str(tmp_path / "again.pt")!r})(x), module(x)))
        print(sorted({{t.dtype for t in frozen.graph.findAllNodes("prim::Constant") if hasattr(t, "dtype")}}))
        """)
    assert out.split() == ["absent", "True", "True", "[]"]
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), expected)


def test_the_file_lists_its_tensors_for_any_reader(tmp_path):
    _, path = exported(tmp_path)
    facts = json.loads(decode(path.read_bytes()).extra["kquant.json"])
    assert list(facts["inputs"]) == ["x"]
    assert facts["tensors"]["head"]["id"] == "head" and facts["tensors"]["head"]["bits"] == 8


@pytest.mark.parametrize(
    ("target", "backend"), [("onednn", "onednn"), ("onednn_fused", "onednn"), ("onednn", "quantized")]
)
def test_batch_height_and_width_may_be_any(tmp_path, target, backend):
    """Each sample gives what it gives alone, to the last bit."""
    _, path = exported(tmp_path, target=target, backend=backend)
    artifact = kquant_torch.load_artifact(path)
    for batch, size in itertools.product((1, 3, 32), (8, 12, 20)):
        x = images(batch, size, seed=9)
        whole = artifact(x)
        assert whole.shape == (batch, 5)
        assert torch.equal(whole, torch.cat([artifact(x[i : i + 1]) for i in range(batch)]))


def test_memory_layout_of_the_input_makes_no_difference(tmp_path):
    _, path = exported(tmp_path)
    artifact = kquant_torch.load_artifact(path)
    x = images()
    assert torch.equal(artifact(x), artifact(x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("backend", ["onednn", "quantized"])
def test_uint8_at_both_ends(tmp_path, backend):
    qmodel, path = exported(tmp_path, backend=backend)
    facts = json.loads(decode(path.read_bytes()).extra["kquant.json"])["tensors"]
    grid, last = facts["x_quantized"], facts["head"]
    codes = torch.clamp(torch.floor(images() / grid["scale"] + 0.5) + grid["zero_point"], 0, 255).to(torch.uint8)
    expected = kquant_torch.load_artifact(path)((codes.float() - grid["zero_point"]) * grid["scale"])
    kquant_torch.export_torchscript(
        qmodel, tmp_path / "u8.pt", example_inputs=images(), backend=backend, input_type="uint8", output_type="uint8"
    )
    made = kquant_torch.load_artifact(tmp_path / "u8.pt")(codes)
    assert made.dtype == torch.uint8
    np.testing.assert_allclose((made.int() - last["zero_point"]).numpy() * last["scale"], expected, rtol=1e-6)
    assert kquant_torch.audit(tmp_path / "u8.pt").fully_integer
    assert kquant_torch.load_artifact(path)(images().numpy()).dtype == np.float32


@pytest.mark.parametrize("export", ["export_torchscript", "export_onnx", "export_program"])
def test_a_file_that_takes_codes_is_verified_on_real_values(tmp_path, export):
    qmodel, path = exported(tmp_path)
    whole = kquant_torch.verify(qmodel, path, images())
    getattr(kquant_torch, export)(
        qmodel, tmp_path / "u8", example_inputs=images(), input_type="uint8", output_type="uint8"
    )
    report = kquant_torch.verify(qmodel, tmp_path / "u8", images())
    assert report.ok and 0.4 < report.max_lsb <= 0.6 and report.samples == whole.samples
    assert len(report.ops) == len(whole.ops) - 1, "the file does not quantize its input"


def test_a_file_that_takes_codes_refuses_real_values(tmp_path):
    qmodel, _ = exported(tmp_path)
    kquant_torch.export_torchscript(qmodel, tmp_path / "u8.pt", example_inputs=images(), input_type="uint8")
    with pytest.raises(kquant_torch.ArtifactError, match="codes of type uint8") as caught:
        kquant_torch.load_artifact(tmp_path / "u8.pt")(images())
    formula = caught.value.fix.removeprefix("Give ")
    codes = eval(formula, {"clip": torch.clamp, "floor": torch.floor, "x": images()}).to(torch.uint8)
    assert kquant_torch.load_artifact(tmp_path / "u8.pt")(codes).shape[0] == images().shape[0]


def test_the_same_model_gives_the_same_bytes_in_any_process(tmp_path):
    _, path = exported(tmp_path)
    code = (
        f"import sys, pathlib; sys.path.insert(0, {str(pathlib.Path(__file__).parent.parent)!r})\n"
        f"from small_torch import exported; exported(pathlib.Path({str(tmp_path / 'other')!r}))"
    )
    (tmp_path / "other").mkdir()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    digests = {hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, tmp_path / "other" / "model.pt")}
    assert len(digests) == 1


@pytest.mark.parametrize("target", ["onednn", "onednn_fused"])
def test_portable_gives_the_same_values_without_vnni(tmp_path, target):
    """ONEDNN_MAX_CPU_ISA=AVX2 makes oneDNN add pairs of products in saturating int16."""
    torch.save(images(64), tmp_path / "x.pt")
    differs = {}
    for portable in (True, False):
        folder = tmp_path / str(portable)
        folder.mkdir()
        qmodel = trained(portable=portable, target=target)
        report = kquant_torch.export_torchscript(qmodel, folder / "model.pt", example_inputs=images())
        assert report.portable is portable
        body = f"""
            x = torch.load({str(tmp_path / "x.pt")!r}, weights_only=True)
            torch.save(torch.jit.load({str(folder / "model.pt")!r})(x), {str(folder / "y.pt")!r})
            """
        alone(body, ONEDNN_MAX_CPU_ISA="AVX2")
        here = kquant_torch.load_artifact(folder / "model.pt")(images(64))
        differs[portable] = not torch.equal(torch.load(folder / "y.pt", weights_only=True), here)
    assert differs == {True: False, False: True}


def test_the_quantized_backend_is_portable_on_the_same_condition(tmp_path):
    """FBGEMM_ENABLE_INSTRUCTIONS=AVX2 makes fbgemm add pairs of products in saturating int16; qnnpack never does."""
    torch.save(images(64), tmp_path / "x.pt")
    differs = {}
    for portable in (True, False):
        qmodel, path = trained(portable=portable), tmp_path / f"{portable}.pt"
        report = kquant_torch.export_torchscript(qmodel, path, example_inputs=images(), backend="quantized")
        assert report.portable is portable
        made = {}
        for engine in ("fbgemm", "qnnpack"):
            body = f"""
                torch.backends.quantized.engine = {engine!r}
                x = torch.load({str(tmp_path / "x.pt")!r}, weights_only=True)
                torch.save(torch.jit.load({str(path)!r})(x), {str(tmp_path / "y.pt")!r})
                """
            alone(body, FBGEMM_ENABLE_INSTRUCTIONS="AVX2")
            made[engine] = torch.load(tmp_path / "y.pt", weights_only=True)
        here = kquant_torch.load_artifact(path)(images(64))
        differs[portable] = {engine: not torch.equal(y, here) for engine, y in made.items()}
    assert differs == {True: {"fbgemm": False, "qnnpack": False}, False: {"fbgemm": True, "qnnpack": False}}


def test_a_build_without_onednn_is_told_what_to_do(tmp_path, monkeypatch):
    """What it is told to do works there."""
    qmodel, path = exported(tmp_path)
    again = tmp_path / "again.pt"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ArtifactError, match='export it with backend="quantized" for fbgemm or qnnpack'):
        kquant_torch.load_artifact(path)
    kquant_torch.export_torchscript(qmodel, again, example_inputs=images(), backend="quantized")
    assert kquant_torch.load_artifact(again)(images()).shape == (4, 5)


def test_the_quantized_backend_runs_nothing_of_onednn(tmp_path):
    """oneDNN writes a line for each kernel that it runs, if it is asked to."""
    torch.save(images(), tmp_path / "x.pt")
    lines = {}
    for backend in ("onednn", "quantized"):
        _, path = exported(tmp_path, backend=backend)
        body = f"""
            torch.backends.quantized.engine = "fbgemm"
            torch.jit.load({str(path)!r})(torch.load({str(tmp_path / "x.pt")!r}, weights_only=True))
            """
        lines[backend] = sum("primitive,exec" in line for line in alone(body, ONEDNN_VERBOSE="1").splitlines())
        assert ("onednn" in decode(path.read_bytes()).code) == (backend == "onednn")
    assert lines["onednn"] > 0 and lines["quantized"] == 0


def test_a_build_without_any_quantized_engine_is_named(tmp_path, monkeypatch):
    _, path = exported(tmp_path, backend="quantized")
    monkeypatch.setattr("kquant_torch.run.engines", lambda: [])
    with pytest.raises(ArtifactError, match="a build of torch with a quantized engine"):
        kquant_torch.load_artifact(path)


def test_both_backends_hold_the_same_codes_and_give_the_same_values(tmp_path):
    """The kernels round half to even, the integer functions half up: a tie may fall either way, and none does here."""
    _, path = exported(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = exported(tmp_path / "other", backend="quantized")
    first, second = (decode(p.read_bytes()).tensors for p in (path, other))
    for name in set(first) & set(second):
        np.testing.assert_array_equal(first[name], second[name])
    kernels = [n for n in first if n.endswith(("_kernel", "_scale", "_bias")) and "identity" not in n]
    assert len(kernels) == 12 and set(kernels) <= set(second)
    made = [kquant_torch.load_artifact(p)(images(64)) for p in (path, other)]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backend": "fbgemm"}, ExportError, "backend: one of"),
        ({"input_type": "int8"}, ExportError, "input_type: one of 'float32', 'uint8'"),
        ({"example_inputs": None}, ModelError, "example_inputs"),
        ({"example_inputs": images()[0]}, ModelError, "a tensor of 4 axes"),
        ({"example_inputs": images().double()}, ModelError, "dtype float32"),
        ({"example_inputs": (images(), images())}, ModelError, "1 tensors"),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(tmp_path, options, error, words):
    qmodel = trained()
    with pytest.raises(error, match=words):
        kquant_torch.export_torchscript(qmodel, tmp_path / "m.pt", **{"example_inputs": images(), **options})
    assert not list(tmp_path.iterdir())


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(ModelError):
        kquant_torch.export_torchscript(Net(), tmp_path / "m.pt", example_inputs=images())


def test_an_excluded_layer_is_named_and_refused(tmp_path):
    qmodel = trained([{"q_bits": 8, "op_types": ["default"]}, {"op_names": ["depth"], "exclude": True}])
    with pytest.raises(ExportError, match="depth"):
        kquant_torch.export_torchscript(qmodel, tmp_path / "m.pt", example_inputs=images())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["onednn", "quantized"])
@pytest.mark.parametrize("layer", ["stem", "depth", "up", "head"])
def test_an_allowed_float_layer_runs_in_float_and_is_named(tmp_path, layer, backend):
    qmodel = trained([{"q_bits": 8, "op_types": ["default"]}, {"op_names": [layer], "exclude": True}])
    path = tmp_path / "m.pt"
    report = kquant_torch.export_torchscript(qmodel, path, example_inputs=images(), backend=backend, allow_float=True)
    assert not report.fully_integer and layer in report.floats
    audit = kquant_torch.audit(path)
    assert layer in {op.name for op in audit.float_ops} and 0 < audit.integer_mac_fraction < 1
    assert kquant_torch.verify(qmodel, path, images(16).numpy()).ok
    with torch.no_grad():
        expected = qmodel(images(64))
    # A code of the quantized layers that falls the other way moves an output by little.
    torch.testing.assert_close(kquant_torch.load_artifact(path)(images(64)), expected, rtol=0.05, atol=0.1)


def test_ranges_that_were_never_set_are_refused(tmp_path):
    qmodel = kquant_torch.wrap(Net().eval(), example_inputs=images())
    with pytest.raises(ExportError, match="calibration_data="):
        kquant_torch.export_torchscript(qmodel, tmp_path / "m.pt", example_inputs=images())


@pytest.mark.parametrize(
    "x", [images()[0], images()[:0], [images(), images()], {"z": images()}, images() * float("nan")]
)
def test_an_artifact_refuses_what_it_cannot_take(tmp_path, x):
    _, path = exported(tmp_path)
    with pytest.raises(ArtifactError):
        kquant_torch.load_artifact(path)(x)


def test_an_archive_survives_encoding():
    arrays = {
        f"a_{dtype}": np.arange(6).reshape(2, 3).astype(dtype)
        for dtype in ("uint8", "int8", "int16", "int32", "int64", "float32", "float64", "bool")
    } | {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(3.5, np.float32)}
    archive = Archive("code\n", arrays, {"kquant.json": "{}", "more": "text"})
    back = decode(encode(archive))
    assert back.code == archive.code and back.extra == archive.extra
    for name, array in arrays.items():
        assert back.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(back.tensors[name], array)
