"""Two processes (gloo): their ranges are equal to the bit, and those of one process that has the whole batch."""

import os
import pathlib
import subprocess
import sys

import ddp_worker
import pytest
import torch

TESTS = pathlib.Path(ddp_worker.__file__).parent


def two_processes(folder, norms, steps):
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, ddp_worker.__file__, str(rank), str(folder / "meet"), str(folder / f"{rank}.pt"), norms,
             str(steps)],
            env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("norms, steps", [("absent", 10), ("frozen", 1), ("moving", 3)])
def test_ranges_of_two_processes(tmp_path, norms, steps):
    first, second = two_processes(tmp_path, norms, steps)
    assert len(first[0]) > 10
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    if norms == "moving":
        return  # each process normalizes by its half of the batch, so one process computes something else
    qmodel = ddp_worker.wrapped(norms, None)
    whole = ddp_worker.train(qmodel, qmodel, slice(None), steps)
    assert all(torch.equal(first[0][k], whole[0][k]) for k in whole[0])
    for a, b in zip(first, whole, strict=True):
        for k in a:  # gradients are summed in another order
            torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6)
    assert not torch.equal(first[0]["x.maximum"], torch.zeros(1))
