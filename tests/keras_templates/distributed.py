"""Training under `tf.distribute`: the ranges of all replicas are those of one process that has the whole batch."""

import numpy as np
import pytest

from keras_templates.replicas import CASES, STEPS
from keras_templates.small import run_python


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the program saved. Virtual devices have to be set up before TensorFlow starts: a process of its own."""
    path = tmp_path_factory.mktemp("replicas") / "ranges.npz"
    run_python(f"from keras_templates import replicas; replicas.main({str(path)!r})")
    with np.load(path) as saved:
        return dict(saved)


def of(found, case, replicas, step):
    """The ranges of one process, or of each of two, as lists."""
    prefix = f"{case}/{replicas}/{step}/"
    mine = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    return [[v for k, v in mine.items() if k.startswith(f"{replica}/")] for replica in range(replicas)]


@pytest.mark.parametrize("case, step", [(case, step) for case in CASES for step in range(STEPS)] + [("loop", "last")])
def test_ranges_of_two_replicas_are_those_of_the_whole_batch(found, case, step):
    (whole,), (first, second) = of(found, case, 1, step), of(found, case, 2, step)
    assert len(whole) == 6 and np.abs(whole).max() > 1.0
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    for mine, theirs in zip(first, whole, strict=True):
        # To the bit before the first update of the weights; behind it gradients were summed in another order.
        np.testing.assert_allclose(mine, theirs, rtol=0.0 if step == 0 else 1e-4)


def test_ranges_move_as_each_case_says(found):
    """The cases above would be equal too if no range had moved."""
    for case in CASES:
        first, last = of(found, case, 2, 0)[0], of(found, case, 2, STEPS - 1)[0]
        assert np.array_equal(first, last) == (case == "naive")


def test_replicas_draw_noise_of_their_own(found):
    """Equal noise on all replicas would not average out."""
    assert (found["noise/2/0"] != found["noise/2/1"]).mean() > 0.1
