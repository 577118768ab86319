"""What is read computes what the model computes, or is refused: at `wrap`, and again at the export."""

import dataclasses
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from parts_torch import One, image, rows
from torch import nn

import kquant_torch as kt

EXPORTS = [kt.export_torchscript, kt.export_onnx, kt.export_program]


def net(*extra):
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()), *extra)


def doubled(module, inputs, output):
    return output * 2.0


def hooked(place: str, hook, before: bool = False):
    model = net()
    module = model.get_submodule(place)
    (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)
    return model


@pytest.mark.parametrize(
    "model, where",
    [
        (hooked("0", doubled), "first at the output of '0'"),
        (hooked("2", doubled), "behind the last layer"),
        (hooked("", doubled), "behind the last layer"),
        (hooked("2.0", lambda m, inputs: (inputs[0] + 1.0,), before=True), "first at the output of '2.0'"),
        (One(lambda m, x: m.d(F.dropout(m.c(x), 0.5)), c=nn.Conv2d(4, 4, 1), d=nn.Conv2d(4, 4, 1)), "output of 'd'"),
    ],
)
def test_what_evaluation_does_besides_is_refused(model, where):
    with pytest.raises(kt.UnsupportedError, match=where):
        kt.wrap(model.eval(), example_inputs=image())


def test_hooks_that_look_on_and_code_that_draws_numbers_itself_stay(tmp_path):
    seen = []
    model = hooked("2.0", lambda module, inputs, output: seen.append(output.shape))
    qmodel = kt.wrap(model, example_inputs=image(), calibration_data=image())
    kt.export_torchscript(qmodel, tmp_path / "model.pt", example_inputs=image())
    assert set(seen) == {(3, 4, 8, 8)}


@pytest.mark.parametrize("export", EXPORTS)
def test_a_hook_that_changes_values_of_a_wrapped_model_is_not_left_out_of_the_file(export, tmp_path):
    qmodel = kt.wrap(net(), example_inputs=image(), calibration_data=image())
    qmodel[0].register_forward_hook(doubled)
    with pytest.raises(kt.UnsupportedError, match="first at the output of '0'"):
        export(qmodel, tmp_path / "model", example_inputs=image())
    assert not list(tmp_path.iterdir())


def test_example_inputs_of_an_export_are_run(tmp_path):
    qmodel = kt.wrap(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), example_inputs=image(), calibration_data=image())
    with pytest.raises(kt.ModelError, match=r"can be called on.*7.*RuntimeError"):
        kt.export_torchscript(qmodel, tmp_path / "model.pt", example_inputs=torch.randn(2, 4, 7, 7))
    assert not list(tmp_path.iterdir())
    convolutional = kt.wrap(net(), example_inputs=image(), calibration_data=image())
    kt.export_torchscript(convolutional, tmp_path / "model.pt", example_inputs=torch.randn(2, 4, 5, 7))
    assert (tmp_path / "model.pt").exists()


def test_named_example_inputs_come_in_any_order(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(5, 6), nn.Linear(6, 6)

        def forward(self, ids, x):
            return self.a(ids) + self.b(x)

    inputs = {"x": rows(), "ids": torch.randint(0, 5, (4,))}
    qmodel = kt.wrap(Two(), example_inputs=inputs, calibration_data=[inputs])
    kt.export_torchscript(qmodel, tmp_path / "model.pt", example_inputs=inputs)
    with pytest.raises(kt.ModelError, match=r"\['ids', 'x'\].*Received: \['ids', 'y'\]"):
        kt.export_torchscript(qmodel, tmp_path / "other.pt", example_inputs={"ids": inputs["ids"], "y": inputs["x"]})


# -- what a model gives ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None
    loss: torch.Tensor | None = None


Pair = namedtuple("Pair", "first second")
GIVEN = {
    "a dataclass": lambda h, y: Found(logits=y, hidden=h),
    "a named tuple": lambda h, y: Pair(y, h),
    "a tuple with None": lambda h, y: (y, None, h),
    "nested": lambda h, y: {"a": [y, (h,)], "loss": None, "is_done": True},
}


@pytest.mark.parametrize("name", GIVEN)
def test_outputs_keep_their_structure(name, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = torch.relu(self.a(x))
            return GIVEN[name](h, self.b(h))

    x, model = rows(), Net().eval()
    qmodel = kt.wrap(model, example_inputs=x, calibration_data=x).eval()
    given, path = qmodel(x), tmp_path / "model.pt"
    assert type(given) is type(model(x))
    if name == "a dataclass":
        assert given.loss is None and given.logits.shape == (4, 3)
    elif name == "nested":
        assert given["loss"] is None and given["is_done"] is True and given["a"][1][0].shape == (4, 5)
    kt.export_torchscript(qmodel, path, example_inputs=x)
    logits, hidden = kt.load_artifact(path)(x)
    assert logits.shape == (4, 3) and hidden.shape == (4, 5)
    assert kt.verify(qmodel, path, x).ok


def test_without_a_tensor_there_is_no_model():
    with pytest.raises(kt.ModelError, match="a tensor among its outputs"):
        kt.wrap(One(lambda m, x: (m.c(x).shape[1], None), c=nn.Conv2d(4, 4, 1)), example_inputs=image())


# -- ids that are moved ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", EXPORTS)
def test_ids_may_be_taken_apart_before_their_tables(export, tmp_path):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(5, 4) for _ in range(3))
            self.out = nn.Linear(12, 2)

        def forward(self, ids):
            return self.out(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1))

    ids = torch.randint(0, 5, (8, 3))
    model = Table().eval()
    qmodel = kt.wrap(model, example_inputs=ids, calibration_data=ids).eval()
    export(qmodel, tmp_path / "model", example_inputs=ids)
    report = kt.verify(qmodel, tmp_path / "model", ids)
    assert report.ok, report.problems
    error = (qmodel(ids) - model(ids)).abs().max() / model(ids).abs().max()
    assert error < 0.03  # three roundings of 1/255 of the range each


def test_a_module_is_read_with_all_its_settings():
    """Each setting that a class says it has is handed to the function that it is read as."""
    from kquant_torch.read_modules import AS_FUNCTION

    unread = {"inplace", "name"}
    for layer, (_, attributes) in AS_FUNCTION.items():
        missing = set(getattr(layer, "__constants__", ())) - set(attributes) - unread
        assert not missing, f"{layer.__name__}: {missing}"


def test_a_difference_on_one_batch_only_is_a_rounding(tmp_path):
    """One value that is rounded the other way, which moves an output of few bits far; and one on every batch."""
    qmodel = kt.wrap(net(), example_inputs=image(), calibration_data=image())
    shown = image().flip(-1).sum()

    def on_one(module, inputs, output):
        return output * 2.0 if torch.isclose(inputs[0].sum(), shown) else output

    handle = qmodel.register_forward_hook(on_one)
    kt.export_torchscript(qmodel, tmp_path / "model.pt", example_inputs=image())
    handle.remove()
    qmodel.register_forward_hook(doubled)
    with pytest.raises(kt.UnsupportedError, match="behind the last layer"):
        kt.export_torchscript(qmodel, tmp_path / "other.pt", example_inputs=image())
