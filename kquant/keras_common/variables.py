"""Arithmetic with a variable in front of a symbolic tensor (`w * x`) while a user's own code is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def as_operations(
    variables: type, functions: Mapping[str, Callable], is_symbolic: Callable[[Any], bool]
) -> Iterator[None]:
    """Let the operators of variables be operations on symbolic tensors, as those of the tensors are.

    By themselves they take the variable's value of now, which is refused, or is a constant that is trained no more.

    Args:
        variables: the class whose operators they are.
        functions: an operation for each operator's method.
        is_symbolic: whether an operand is a symbolic tensor.
    """
    own = {name: variables.__dict__.get(name) for name in functions}
    for name, function in functions.items():
        setattr(variables, name, _operator(function, getattr(variables, name), is_symbolic))
    try:
        yield
    finally:
        for name, method in own.items():
            if method is None:
                delattr(variables, name)
            else:
                setattr(variables, name, method)


def _operator(function: Callable, method: Callable, is_symbolic: Callable[[Any], bool]) -> Callable:
    def operate(variable: Any, other: Any) -> Any:
        return function(variable, other) if is_symbolic(other) else method(variable, other)

    return operate
