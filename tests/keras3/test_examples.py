"""The examples, run as the README says."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import kquant

ROOT = pathlib.Path(__file__).parents[2]
LABELS = ["Float", "Naive 8-bit", "QAT 8-bit", "QAT W4A8", "QAT W4A4", "DoReFa W1A2"]


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def demo(*arguments):
    return python("-m", "examples.digits_keras3", *map(str, arguments))


@pytest.mark.slow
def test_demo_prints_its_table_and_writes_its_files(tmp_path):
    out = tmp_path / "made" / "here"
    done = demo("--out", out, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (heads,) = [i for i, line in enumerate(lines) if line.startswith("model ")]
    assert lines[heads].split() == "model calibrated accuracy size latency max_lsb fully integer file".split()
    table = lines[heads + 2 : heads + 2 + len(LABELS)]
    assert [line[: len(label)] for line, label in zip(table, LABELS, strict=True)] == LABELS
    assert str(out.resolve()) in done.stdout

    rows = json.loads((out / "results.json").read_text())
    assert [row["label"] for row in rows] == LABELS
    for row, line in zip(rows, table, strict=True):
        file = out / row["file"]
        assert row["size"] == file.stat().st_size
        assert row["latency"] > 0
        assert f"{row['accuracy']:.1%}" in line
        assert row["fully_integer"] == kquant.audit(file).fully_integer == (row["label"] != "Float")
        if row["label"] != "Float":
            # One short epoch each: far above the 10 % of a guess, and each quantizer keeps what float training found.
            assert row["accuracy"] > (0.6 if "DoReFa" in row["label"] else 0.95)
            assert row["max_lsb"] <= 0.6
            assert row["size"] < 0.5 * rows[0]["size"]
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(out.iterdir())) == len(LABELS) + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", ROOT / "setup.py"], "--out: expected a folder that can be written to"),
        (["--epochs", 0], "--epochs: expected 1 or more. Received: 0"),
    ],
)
def test_demo_refuses_bad_options_at_once(arguments, message):
    done = demo(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_stops_politely(tmp_path):
    program = f"""
import examples.digits_keras3 as demo
def interrupted(*arguments):
    raise KeyboardInterrupt
demo.run = interrupted
raise SystemExit(demo.main(["--out", {str(tmp_path)!r}]))
"""
    done = python("-c", program)
    assert done.returncode == 130
    assert "Stopped" in done.stderr
    assert "Traceback" not in done.stderr
