"""Every error of the project says where, what was expected, what was received and what to do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from kquant.core import errors

ROOT = Path(__file__).parents[2]
KINDS = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.KQuantError)}
FILES = sorted(p for package in ("kquant", "kquant_torch") for p in (ROOT / package).rglob("*.py"))


def raised(source: str) -> Iterator[ast.Call]:
    """The calls that make an error of the project."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in KINDS:
            yield node


def says_what_to_do(call: ast.Call) -> bool:
    """Whether `fix` is given: fourth, by name, or within what is unpacked."""
    named = any(k.arg in ("fix", None) for k in call.keywords)
    return named or len(call.args) == 4 or any(isinstance(a, ast.Starred) for a in call.args)


def test_every_error_says_what_to_do():
    lacking = [
        f"{p.relative_to(ROOT)}:{c.lineno}" for p in FILES for c in raised(p.read_text()) if not says_what_to_do(c)
    ]
    assert sum(1 for p in FILES for _ in raised(p.read_text())) > 200  # the calls were found at all
    assert lacking == []


def test_a_missing_fix_is_found():
    calls = list(raised('ModelError("a", "b", "c")\nerrors.ModelError("a", "b", fix="c")\nModelError("a", *rest)'))
    assert [says_what_to_do(c) for c in calls] == [False, True, True]


def test_a_choice_is_refused_with_its_nearest_spelling_by_the_error_that_is_asked_for():
    errors.check_choice("unit", "epochs", ("epochs", "steps"))
    for kind in (errors.ConfigError, errors.ExportError):
        with pytest.raises(kind) as caught:
            errors.check_choice("unit", "epoch", ("epochs", "steps"), kind)
        assert str(caught.value) == "unit: one of 'epochs', 'steps'. Nearest: 'epochs'. Received: 'epoch'"
