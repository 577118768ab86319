"""A weight range per tensor in front of a batch norm: the kernel is quantized with the norm's factor in it.

Jacob et al. 2018, section 3.2: `w * gamma / sigma` is what is quantized and what the artifact holds, on one scale.
"""

import numpy as np
import pytest

import kquant
from kquant.core.lower import lower
from kquant.tf1 import read

from .nets import X, fused_norm, small, unfused_norm, v1

CONFIG = [{"q_bits": 8, "op_types": ["default"], "quant_scheme": {"weight": "tensor_symmetric"}}]
FOLDED = {"q_bits": 8, "op_names": ["first/conv"], "quant_scheme": {"weight": "tensor_symmetric"}}
FORMS = pytest.mark.parametrize(
    ("norm", "training", "resource"),
    [(n, t, r) for n in (fused_norm, unfused_norm) for t in (True, False) for r in (True, False)],
)


def quantized(norm, training, resource=True, gamma=None, config=CONFIG):
    """A small graph, quantized, and a session in which its norm's gammas have both signs or are as given."""
    net = small(training, norm, resource)
    session = net.session()
    rng = np.random.default_rng(2)
    with net.graph.as_default():
        for name, values in {
            "gamma": rng.normal(size=8) if gamma is None else gamma,
            "variance": rng.uniform(0.2, 3.0, 8),
        }.items():
            (variable,) = [v for v in v1.global_variables() if v.op.name == f"first/{name}"]
            variable.load(values, session)
    kquant.QAT_Quantizer(config)(net.graph, X, training=training, session=session)
    return net, session


def values(net, session, *names):
    with net.graph.as_default():
        found = {v.op.name: v for v in v1.global_variables()}
    return [np.asarray(session.run(found[f"first/{n}"]), np.float64) for n in names]


def written(session):
    """The folded op's integer kernel, its channels last, and their scales."""
    op = next(op for op in lower(read(session)).ops if op.weight is not None)
    return op.weight.codes.reshape(-1, 8), op.weight.scale


def assert_verifies(session, path):
    kquant.export_tflite(session, path)
    parity = kquant.verify(session, path, X)
    assert parity.ok, parity.problems
    assert parity.max_lsb <= 0.6


@FORMS
def test_the_codes_are_those_of_the_folded_kernel_on_one_scale(norm, training, resource, tmp_path):
    """The codes are the paper's, but where float32 cannot tell which is nearer."""
    net, session = quantized(norm, training, resource)
    if training:
        train = net.train_op()
        with net.graph.as_default():
            added = [v for v in v1.global_variables() if "Adam" in v.op.name or v.op.name.startswith("beta")]
            session.run(v1.variables_initializer([*added, v1.train.get_or_create_global_step()]))
        for _ in range(2):
            session.run(train, net.feeds())
    kernel, gamma, variance = values(net, session, "kernel", "gamma", "variance")
    folded = kernel.reshape(-1, 8) * gamma / np.sqrt(variance + 1e-3)
    scale = np.abs(folded).max() / 127
    exact, sign = folded / scale, np.where(gamma < 0, -1.0, 1.0)
    near = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4
    codes, scales = written(session)
    np.testing.assert_array_equal(codes[~near], (np.floor(exact * sign + 0.5) * sign)[~near])
    np.testing.assert_allclose(scales, scale, rtol=1e-6)
    assert np.unique(scales).size == 1
    assert_verifies(session, tmp_path / "m.tflite")
    assert {op.granularity for op in kquant.audit(tmp_path / "m.tflite").ops if op.weight_bits} == {"per-tensor"}


@pytest.mark.parametrize("norm", [fused_norm, unfused_norm])
@pytest.mark.parametrize("gamma", [[1, 0, -2, 0.5, 0, 1, 3, -1], np.zeros(8)])
def test_a_gamma_of_zero_is_harmless_and_learns(norm, gamma, tmp_path):
    """Such a channel deploys as its offset; in training it has a range of its own, so its gamma learns as with one."""
    dead = np.asarray(gamma) == 0
    gradients = []
    for config in ([FOLDED], []):
        net, session = quantized(norm, True, gamma=gamma, config=[{"q_bits": 8, "op_types": ["default"]}, *config])
        if config:
            assert not written(session)[0][:, dead].any()
            assert_verifies(session, tmp_path / "m.tflite")
        with net.graph.as_default():
            (variable,) = [v for v in v1.trainable_variables() if v.op.name == "first/gamma"]
            gradients.append(session.run(v1.gradients(net.loss, [variable])[0], net.feeds())[dead])
    assert np.abs(gradients[1]).max() > 1e-3  # without the floor rounding alone would be left
    # The other channels are on the one scale here and on their own there: their rounding moves it by a fifth. Without
    # the floor it would be off by its whole size.
    np.testing.assert_allclose(*gradients, atol=0.3 * np.abs(gradients[1]).max())


def test_no_gradient_reaches_gamma_through_the_kernel():
    net, session = quantized(fused_norm, True)
    with net.graph.as_default():
        kernel = net.graph.get_tensor_by_name("kquant/first/conv/kernel/quantized:0")
        found = {v.op.name: v for v in v1.trainable_variables()}
        assert v1.gradients(kernel, [found["first/gamma"]]) == [None]
        (through,) = v1.gradients(kernel, [found["first/kernel"]])
    np.testing.assert_array_equal(session.run(through), 1.0)
