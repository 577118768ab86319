"""What the digits example prints and writes, for the tests of each framework that it runs in."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
LABELS = ["Float", "Naive 8-bit", "QAT 8-bit", "QAT W4A8", "QAT W4A4", "DoReFa W1A2"]


def python(*arguments):
    """Run this interpreter in the root of the project."""
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
    """The example as the README runs it."""
    return python("-m", "examples.digits", *map(str, arguments))


def check_demo(framework, out, fully_integer):
    """Run one short epoch and hold what is printed against the files; `fully_integer` audits a file."""
    done = demo("--framework", framework, "--out", out, "--epochs", 1)
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
        assert row["fully_integer"] == (row["label"] != "Float")
        if row["label"] != "Float":
            assert fully_integer(file)
            # One short epoch each: far above the 10 % of a guess, and each quantizer keeps what float training found.
            assert row["accuracy"] > (0.6 if "DoReFa" in row["label"] else 0.95)
            assert row["max_lsb"] <= 0.6
            assert row["size"] < 0.5 * rows[0]["size"]
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(out.iterdir())) == len(LABELS) + 2
