"""The tf_keras example, run as the README says."""

import re

import pytest
from digits_demo import python


@pytest.mark.slow
def test_the_example_prints_its_table_and_writes_its_files(tmp_path):
    done = python("-m", "examples.digits_tf_keras", "--out", str(tmp_path), "--epochs", "2")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(tfmot|kquant|kquant, tfmot's API) +([\d.]+)% +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
    assert [label for label, *_ in rows] == ["tfmot", "kquant", "kquant, tfmot's API"]
    accuracy, size, floats = ([float(row[i]) for row in rows] for i in (1, 2, 3))
    assert min(accuracy[1:]) > 93  # the float model has about 97 after as little training
    assert min(accuracy[1:]) > accuracy[0] - 3
    assert size[2] < size[1] < 0.6 * size[0]
    assert floats[0] > 0
    assert floats[1:] == [0, 0]
    assert done.stdout.count("as trained: True") == 2
    assert [int(p.stat().st_size) for p in (tmp_path / "tfmot.tflite", tmp_path / "kquant.tflite")] == size[:2]
