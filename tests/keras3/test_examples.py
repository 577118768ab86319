"""The digits example, run as the README says."""

import pytest
from digits_demo import ROOT, check_demo, demo, python

import kquant


@pytest.mark.slow
def test_demo_prints_its_table_and_writes_its_files(tmp_path):
    check_demo("keras", tmp_path / "made" / "here", lambda path: kquant.audit(path).fully_integer)


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
import examples.digits as demo
def interrupted(*arguments):
    raise KeyboardInterrupt
demo.run = interrupted
raise SystemExit(demo.main(["--out", {str(tmp_path)!r}]))
"""
    done = python("-c", program)
    assert done.returncode == 130
    assert "Stopped" in done.stderr
    assert "Traceback" not in done.stderr
