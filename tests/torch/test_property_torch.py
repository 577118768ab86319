"""Random models of torch through the whole way: wrap, calibrate, perhaps a training step, export, audit, verify."""

from collections import Counter

import hypothesis
import pytest
import torch
from build_torch import build
from descriptions import Description, models
from occurred import FULL, check_occurred, wanted

import kquant_torch
from kquant_torch.backends import CHOICES as BACKENDS
from kquant_torch.export import integer_model, quantized_graph
from kquant_torch.target import ONEDNN

VERIFIED = 48  # samples; an op's mean error, whose limit is 0.02 codes, means nothing on a handful of values
SEEN: Counter = Counter()


def pytest_generate_tests(metafunc):
    if "index" in metafunc.fixturenames:
        metafunc.parametrize("index", range(metafunc.config.getoption("models")))


def data(description: Description, salt: int, samples: int = 6) -> torch.Tensor:
    """Samples as torch takes them: ids as int64."""
    x = torch.from_numpy(description.data(salt, samples))
    return x.long() if description.vocabulary else x


def quantized(description: Description) -> torch.nn.Module:
    """The quantized model of a description, calibrated, and trained for one step if it says so."""
    torch.manual_seed(description.seed)
    x = data(description, 0)
    model = kquant_torch.wrap(build(description), list(description.config), example_inputs=x[:2], calibration_data=[x])
    if description.train and list(model.parameters()):
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        made = model.train()(data(description, 1))
        made = made if isinstance(made, tuple) else (made,)
        sum(y.square().mean() for y in made).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def occurrences(model: torch.nn.Module, description: Description) -> set:
    """What a quantized model holds: table rows, bits of activations and weights, quantizers."""
    graph = quantized_graph(model)
    integer = integer_model(graph)
    ops = [op for op in integer.ops if op.parts]
    found: set = {("row", part.kind) for op in ops for part in op.parts} - {("row", "fake_quant")}
    found |= {("row", op.kind) for op in graph.ops if op.kind == "identity"}  # nothing of it is in the integer model
    found |= {("activation bits", integer.tensors[op.outputs[0]].affine.bits) for op in ops}
    formulas = [part.attrs["formula"] for op in ops for part in op.parts if "formula" in part.attrs]
    found |= {("weight bits", formula.bits) for formula in formulas}
    return found | {("quantizer", entry["quantizer"]) for entry in description.config}


def is_refused(model: torch.nn.Module, path, x: torch.Tensor, backend: str) -> bool:
    """Export a model; whether it was refused for a range: by the name of the tensor, and without a file."""
    try:
        kquant_torch.export_torchscript(model, path, example_inputs=x, backend=backend)
    except kquant_torch.RangeError as refusal:
        assert refusal.where.startswith("tensor ") and not path.exists()
        return True
    return False


def check(description: Description, folder, engine: str) -> set:
    """Assert the contract of an export on one model, with both backends; returns what occurred in it."""
    model = quantized(description)
    path, x, found = folder / "model.pt", data(description, 0)[:2], occurrences(model, description)
    for backend in BACKENDS:
        path.unlink(missing_ok=True)
        if is_refused(model, path, x, backend):
            found.add(("refused", backend))
            continue
        assert kquant_torch.audit(path).fully_integer
        report = kquant_torch.verify(model, path, [data(description, 2, VERIFIED)])
        assert report.ok, (backend, engine, report.problems)
        content = path.read_bytes()
        kquant_torch.export_torchscript(model, path, example_inputs=x, backend=backend)
        assert content == path.read_bytes()
    return found


@pytest.mark.filterwarnings("ignore:DoReFa clips activations")
def test_random_model_keeps_the_contract(index, tmp_path, record_property, quantized_engine):
    kept: list[set] = []
    engine = ("fbgemm", "qnnpack")[index % 2]
    quantized_engine(engine)

    @hypothesis.seed(index)
    @hypothesis.settings(
        max_examples=1, deadline=None, database=None, report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(models(index))
    def one(description):
        kept.append(check(description, tmp_path, engine))

    one()
    SEEN.update(["models", *kept[-1]])
    record_property("occurred", sorted(kept[-1], key=str))


def test_everything_occurred(pytestconfig, capsys):
    """In the full run each row, bit width and quantizer occurred at least five times; the counts are printed."""
    if pytestconfig.getoption("models") < FULL:
        pytest.skip(f"asked of a run of at least {FULL} models (--models); {SEEN['models']} passed here")
    counts = ", ".join(f"{what} {which} {SEEN[what, which]}" for what, which in wanted(ONEDNN.rows))
    refused = ", ".join(f"{SEEN['refused', which]} by {which}" for which in BACKENDS)
    with capsys.disabled():
        print(f"\n{SEEN['models']} models: {counts}; refused {refused}")
    assert SEEN["models"] >= FULL
    check_occurred(SEEN, ONEDNN.rows)
