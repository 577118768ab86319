"""`audit` of TorchScript files: what is integer, what is not, and every kind of file that is none; nothing is run."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from small_torch import exported

import kquant_torch
from kquant.core.errors import ArtifactError
from kquant_torch.archive import CODE, Archive, decode, encode
from kquant_torch.audit import audit_bytes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> bytes:
    return exported(tmp_path_factory.mktemp("audit"))[1].read_bytes()


def test_what_it_says_of_a_whole_file(data):
    report = audit_bytes(data)
    assert report.fully_integer and report.integer_mac_fraction == 1.0 and not report.float_ops
    rows = {row.name: row for row in report.ops}
    # 8 channels of 8 x 8 from 3 x 3 x 3 products; depthwise 3 x 3; transposed 2 x 2 spread to 16 x 16.
    assert rows["relu"].macs == 8 * 64 * 27 and rows["depth"].macs == 8 * 64 * 9
    assert rows["up"].macs == 8 * 256 * 8 * 4
    assert rows["head"].macs == 40 and report.macs == sum(r.macs for r in report.ops)
    assert rows["depth"].inputs == ("uint8", "int8") and rows["depth"].output == "uint8"
    assert rows["depth"].granularity == "per-channel" and rows["depth"].weight_bits == 8
    assert report.file_bytes == len(data) and report.runtime == "torch"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> bytes:
    return exported(tmp_path_factory.mktemp("quantized"), backend="quantized")[1].read_bytes()


def test_the_quantized_backend_has_the_same_work_and_kernels(data, quantized):
    report, other = audit_bytes(quantized), audit_bytes(data)
    assert report.fully_integer and report.macs == other.macs
    rows, others = ({row.name: row for row in r.ops} for r in (report, other))
    assert rows["depth"].inputs == ("quint8", "int8") and rows["depth"].output == "quint8"
    assert rows["depth"].kind == "quantized::conv2d" and rows["head"].kind == "quantized::linear"
    assert rows["relu#2"].kind == "quantized::add"
    for name in ("relu", "depth", "up", "head"):
        assert rows[name].bytes < others[name].bytes  # no zero point for each kernel
        assert rows[name]._replace(kind="", inputs=(), output="", bytes=0) == others[name]._replace(
            kind="", inputs=(), output="", bytes=0
        )


@pytest.mark.parametrize(
    ("old", "new", "op", "cause"),
    [
        ("conv2d_prepack(weight, bias,", "conv2d_prepack(weight, None,", "depth", "quantized::conv2d reads float"),
        (
            "    mean = ",
            "    extra = torch.dequantize(depth)\n    mean = ",
            "extra",
            "aten::dequantize is not an integer",
        ),
        (
            "    mean = ",
            "    extra = torch._make_per_tensor_quantized_tensor(x, 1.0, 0)\n    mean = ",
            "extra",
            "reads float values",
        ),
    ],
)
def test_what_is_not_integer_in_the_quantized_backend_is_named(quantized, old, new, op, cause):
    report = audit_bytes(changed(quantized, old, new))
    assert not report.fully_integer
    assert any(op == f.name and cause in f.cause for f in report.float_ops), report.float_ops


def changed(data: bytes, old: str, new: str) -> bytes:
    archive = decode(data)
    assert old in archive.code
    return encode(Archive(archive.code.replace(old, new), archive.tensors, archive.extra))


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("torch.permute", "torch.relu", "the function lookup is not the one that kquant writes"),
        (
            "    mean = ",
            "    extra = torch.softmax(max_pool2d, 1)\n    mean = ",
            "aten::softmax is not an integer kernel",
        ),
        ("    mean = ", "    extra = torch.reshape(x, [-1])\n    mean = ", "it moves float values"),
        ("    mean = ", "    extra = __torch__.kquant.dequantize(max_pool2d, 1.0, 0)\n    mean = ", "inside the model"),
    ],
)
def test_what_is_not_integer_is_named_with_its_cause(data, old, new, cause):
    report = audit_bytes(changed(data, old, new))
    assert not report.fully_integer
    assert any(cause in op.cause for op in report.float_ops), report.float_ops


@pytest.mark.parametrize("file", ["data", "quantized"])
def test_float_weights_are_not_integer(file, request):
    archive = decode(request.getfixturevalue(file))
    tensors = {n: a.astype(np.float32) if n == "depth_kernel" else a for n, a in archive.tensors.items()}
    report = audit_bytes(encode(Archive(archive.code, tensors, archive.extra)))
    assert [op.name for op in report.float_ops] == ["depth"]
    assert report.integer_mac_fraction < 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(data, share):
    with pytest.raises(ArtifactError):
        audit_bytes(data[: int(len(data) * share)])


def test_damaged_files_give_a_report_or_an_error_of_ours(data):
    rng = np.random.default_rng(0)
    for _ in range(300):
        copy = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 8)):
            copy[at] = rng.integers(256)
        try:
            audit_bytes(bytes(copy))
        except ArtifactError:
            pass


def test_random_bytes():
    rng = np.random.default_rng(1)
    for size in (0, 1, 100, 10_000):
        with pytest.raises(ArtifactError):
            audit_bytes(rng.bytes(size))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_foreign_files(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "state.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    (tmp_path / "text.pt").write_text("a text")
    for name in ("state.pt", "script.pt", "text.pt", "missing.pt", "."):
        with pytest.raises(ArtifactError):
            kquant_torch.audit(tmp_path / name)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def with_record(data: bytes, name: str, content: bytes, **options) -> bytes:
    """A file with one record replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            is_it = info.filename == f"kquant/{name}"
            new.writestr(
                zipfile.ZipInfo(info.filename), content if is_it else old.read(info), **(options if is_it else {})
            )
    return buffer.getvalue()


def test_nothing_in_a_file_is_executed(data, capsys):
    with pytest.raises(ArtifactError):
        audit_bytes(with_record(data, "data.pkl", pickle.dumps(Evil(), 2)))
    for protocol in (2, 4):
        with pytest.raises(ArtifactError):
            audit_bytes(with_record(data, "data.pkl", pickle.dumps(np.zeros(3), protocol)))
    assert "executed" not in capsys.readouterr().out


def test_a_record_that_would_unpack_to_more_than_the_file(data):
    with pytest.raises(ArtifactError, match="stored records"):
        audit_bytes(with_record(data, CODE, b"\n" * 2**24, compress_type=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    "code", ["", "x = 1\n", "(" * 5000, "class Artifact(Module):\n  def forward(self): pass\n", "\0"]
)
def test_code_that_is_not_ours(data, code):
    archive = decode(data)
    with pytest.raises(ArtifactError):
        audit_bytes(encode(Archive(code, archive.tensors, archive.extra)))
