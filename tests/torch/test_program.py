"""The `.pt2` file: layers and functions held against the model, in a process of its own, and changed numbers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from qdq_cases_torch import calibrated, cases
from small_torch import exported, images

import kquant_torch
from kquant.core.errors import ArtifactError, ExportError
from kquant_torch.export import integer_model, quantized_graph
from kquant_torch.program_export import ProgramFile
from kquant_torch.run import run_all

# Each op kind once; an export takes seconds.
CHOSEN = (
    "conv1d", "conv3d", "grouped transposed conv", "embedding bag", "prelu", "linear + norm", "attention",
    "max pools", "average pool", "adaptive pools", "upsample nearest", "upsample bilinear", "paddings",
    "activation relu6", "scalars", "maximum", "cat", "slices", "gather", "sum", "expand",
    "attention with the batch second", "where with numbers",
)  # fmt: skip


@pytest.mark.parametrize(("name", "config"), cases(CHOSEN))
def test_a_file_holds_and_computes_what_was_trained(name, config, tmp_path):
    qmodel, batches = calibrated(name, config)
    path = tmp_path / "model.pt2"
    kquant_torch.export_program(qmodel, path, example_inputs=batches[0])
    parity = kquant_torch.verify(qmodel, path, batches)
    assert parity.ok, parity.problems


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A network as TorchScript and as a program."""
    folder = tmp_path_factory.mktemp("program")
    qmodel, script = exported(folder)
    kquant_torch.export_program(qmodel, folder / "model.pt2", example_inputs=images())
    return qmodel, script, folder / "model.pt2"


def test_it_agrees_with_torchscript_op_by_op_within_one_code(both):
    """Wherever both read the same codes, both write codes at most one apart."""
    qmodel, script, path = both
    model = integer_model(quantized_graph(qmodel))
    x = images(16).numpy()
    theirs = ProgramFile(path.read_bytes(), "file", model).run([x])
    ours = run_all(script.read_bytes(), [x])
    compared = 0
    for op in model.ops:
        if all(np.array_equal(ours[t], theirs[t]) for t in op.inputs):
            distance = np.abs(ours[op.outputs[0]].astype(np.float64) - theirs[op.outputs[0]])
            assert distance.max() <= 1, op.id
            compared += 1
    assert compared >= 3  # a tie that falls the other way ends the comparison downstream


def test_it_runs_where_the_project_is_not_installed(both, tmp_path):
    torch.save(images(7), tmp_path / "x.pt")
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("kquant", "kquant_torch"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch, torch.ao.quantization.fx._decomposed
x = torch.load({str(tmp_path / "x.pt")!r}, weights_only=True)
print(tuple(torch.export.load({str(both[2])!r}).module()(x).shape))
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert made.stdout.strip() == "(7, 5)", made.stderr


def test_the_same_model_gives_the_same_bytes_without_paths(both, tmp_path):
    kquant_torch.export_program(both[0], tmp_path / "again.pt2", example_inputs=images())
    data = both[2].read_bytes()
    assert (tmp_path / "again.pt2").read_bytes() == data
    assert b"kquant_torch/qdq.py" not in data


@pytest.mark.parametrize(("role", "words"), [("kernel", "kernel of channel"), ("bias", "bias of channel")])
def test_one_changed_number(both, role, words, monkeypatch):
    """The arrays of a loaded file, one of them changed."""
    qmodel, _, path = both
    plain = ProgramFile.__init__

    def changed(self, *arguments):
        plain(self, *arguments)
        name = f"{self.facts['arrays']['depth']}_{role}"
        values = self.arrays[name].copy()
        values.flat[0] = values.flat[0] - 1
        self.arrays[name] = values

    monkeypatch.setattr(ProgramFile, "__init__", changed)
    report = kquant_torch.verify(qmodel, path, images().numpy())
    assert not report.ok and f"op 'depth': the {words}" in report.problems[0]


def test_files_that_are_none(both, tmp_path):
    data = both[2].read_bytes()
    (tmp_path / "model.pt2").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError):
        kquant_torch.verify(both[0], tmp_path / "model.pt2", images().numpy())


def test_bad_arguments(both, tmp_path):
    with pytest.raises(ExportError, match="output_type"):
        kquant_torch.export_program(both[0], tmp_path / "m.pt2", example_inputs=images(), output_type="int8")
