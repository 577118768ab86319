"""What every entry point does first: it takes the module itself, and computes in float32 whatever is around it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from kquant.core.errors import ModelError

F = TypeVar("F", bound=Callable[..., Any])
# Wrappers around a module, by name, since a build of torch may lack some; and where they keep it.
AROUND = {
    **dict.fromkeys(("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"), "model.module"),
    "AveragedModel": "model.module",
    "OptimizedModule": "model._orig_mod",
}


def undisturbed(entry: F) -> F:
    """An entry point whose first argument is a model.

    In autocast it would see bfloat16 values, and in inference mode the ranges that it makes could not be trained.

    Raises:
        ModelError: a model inside a wrapper of torch's, or one that was compiled to TorchScript.
    """

    @functools.wraps(entry)
    def called(model: Any, *args: Any, **kwargs: Any) -> Any:
        check_bare(model)
        return _in_float32(lambda: entry(model, *args, **kwargs))

    return called  # type: ignore[return-value]  # of the same signature, which types cannot say


def _in_float32(call: Callable[[], Any]) -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        return call()


def check_bare(model: Any) -> None:
    """Refuse a module around the user's own, whose names and code are not those of the model.

    Raises:
        ModelError: with where the module itself is.
    """
    if isinstance(model, torch.jit.ScriptModule):
        fix = "Hand in the Python module that it was made of; its file is TorchScript by itself"
        raise ModelError("model", "a torch.nn.Module with Python code", type(model).__name__, fix)
    inside = AROUND.get(type(model).__name__)
    if inside is not None and isinstance(model, nn.Module):
        raise ModelError("model", "the module itself", f"it inside a {type(model).__name__}", f"Hand in {inside}")
