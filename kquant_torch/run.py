"""Runs an artifact on stock torch: `load_artifact` for a user, `run_all` for verification."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from kquant.core.errors import ArtifactError
from kquant.core.files import read_bytes
from kquant.core.integer import IntegerModel
from kquant_torch.archive import CLASS, MODULE, ROOT, Archive, decode, encode
from kquant_torch.emit import SHIFT_OF_CODES, unsigned
from kquant_torch.program import Program, calls, dotted, parse
from kquant_torch.target import QUANTIZED, TARGETS


def engines() -> list[str]:
    """The engines of quantized kernels in this build of torch."""
    return [name for name in torch.backends.quantized.supported_engines if name != "none"]


def check_build(target: str, where: str) -> None:
    """Refuse a file whose kernels this build of torch lacks.

    Raises:
        ArtifactError: with what to do.
    """
    if target == QUANTIZED.name:
        if not engines():
            raise ArtifactError(
                where,
                "a build of torch with a quantized engine",
                "none of fbgemm, qnnpack, onednn",
                "Use a build with one, or export with the default backend",
            )
    elif not torch.backends.mkldnn.is_available():
        raise ArtifactError(
            where,
            "a build of torch with oneDNN",
            "torch.backends.mkldnn.is_available() is False",
            'Its kernels are oneDNN\'s: export it with backend="quantized" for fbgemm or qnnpack',
        )


def loaded(data: bytes, target: str, where: str) -> Any:
    """The TorchScript module in a file's bytes, which is of a target. This runs the file's code.

    Raises:
        ArtifactError: torch cannot load it; on a build without its kernels with what to do.
    """
    check_build(target, where)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
            return torch.jit.load(io.BytesIO(data)).eval()
    except RuntimeError as error:
        received = str(error).strip().splitlines()[0][:200]
        raise ArtifactError(
            where,
            "a file that torch.jit.load can load",
            received,
            "Load it with the torch version that wrote it, or write it again",
        ) from error


def facts(archive: Archive, where: str) -> dict[str, Any]:
    """What the file says about its own tensors, inputs and outputs."""
    try:
        found = json.loads(archive.extra[f"{ROOT}.json"])
        if not isinstance(found["tensors"], dict) or not isinstance(found["inputs"], dict):
            raise TypeError("tensors and inputs are expected")
        if found["target"] not in TARGETS:
            raise ValueError(f"the target {found['target']!r} is not one of {', '.join(TARGETS)}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ArtifactError(
            where,
            "a description of the artifact's tensors",
            str(error),
            "Only files of kquant_torch.export_torchscript are read here",
        ) from error
    return dict(found)


class Artifact:
    """An artifact that runs like a function.

    Example:
        >>> model = load_artifact("model.pt")  # doctest: +SKIP
        >>> model(images).argmax(1)  # doctest: +SKIP
    """

    def __init__(self, data: bytes, where: str = "artifact"):
        archive = decode(data, where)
        self.where, self.facts = where, facts(archive, where)
        self.input_names, self.output_names = list(self.facts["inputs"]), list(self.facts["outputs"])
        self._module = loaded(data, self.facts["target"], where)

    def __call__(self, x: Any) -> Any:
        """Run it.

        Args:
            x: a tensor or array; for several inputs a list of them in the file's order, or a dict by name.

        Returns:
            A tensor, or an array if the inputs were arrays; for several outputs a list.

        Raises:
            ArtifactError: a wrong number of inputs, an unknown name, a shape that does not fit.
        """
        values = self._values(x)
        are_arrays = not any(isinstance(v, torch.Tensor) for v in values)
        try:
            tensors = [torch.as_tensor(v) for v in values]
        except (TypeError, ValueError, RuntimeError) as error:
            received = ", ".join(type(v).__name__ for v in values)
            raise ArtifactError(self.where, "tensors or arrays", received, "Pass a tensor for each input") from error
        for name, tensor in zip(self.input_names, tensors, strict=True):
            self._check(name, tensor)
        made = self._run(tensors)
        results = list(made) if isinstance(made, tuple) else [made]
        results = [r.numpy() for r in results] if are_arrays else results
        return results if len(results) > 1 else results[0]

    def _run(self, tensors: list[torch.Tensor]) -> Any:
        try:
            with torch.no_grad():
                return self._module(*tensors)
        except RuntimeError as error:
            sizes = {n: tuple(t.shape) for n, t in zip(self.input_names, tensors, strict=True)}
            last = (str(error).strip().splitlines() or [""])[-1]
            fix = "Only the batch may differ from the example inputs, or, where all layers are convolutions, the image"
            raise ArtifactError(self.where, "inputs of sizes that its kernels take", f"{sizes}: {last}", fix) from error

    def _values(self, x: Any) -> list[Any]:
        if isinstance(x, Mapping):
            if set(x) != set(self.input_names):
                raise ArtifactError(
                    self.where, f"a value for each of {self.input_names}", sorted(x), "Give every input by that name"
                )
            return [x[n] for n in self.input_names]
        values = list(x) if isinstance(x, list | tuple) else [x]
        if len(values) != len(self.input_names):
            raise ArtifactError(
                self.where,
                f"{len(self.input_names)} inputs: {self.input_names}",
                len(values),
                "Pass a list in that order, or a dict by name",
            )
        return values

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        described = self.facts["tensors"][self.facts["inputs"][name]]
        expected = described["shape"]
        where = f"{self.where}, input {name!r}"
        # Sizes may differ, as those of an image may; where they cannot, a kernel says so below.
        if tensor.ndim != len(expected):
            raise ArtifactError(
                where,
                f"{len(expected)} axes",
                f"shape {tuple(tensor.shape)}",
                "Give a batch: a single sample is x[None]",
            )
        if tensor.ndim and tensor.shape[0] == 0:
            raise ArtifactError(where, "at least one sample", f"shape {tuple(tensor.shape)}", "Leave empty batches out")
        if "scale" in described and tensor.dtype != torch.uint8:
            codes = f"clip(floor(x / {described['scale']} + 0.5) + {described['zero_point']}, 0, 255)"
            raise ArtifactError(where, "codes of type uint8", tensor.dtype, f"Give {codes}")
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ArtifactError(
                where,
                "values that are not NaN",
                f"{int(tensor.isnan().sum())} NaN",
                "Repair or leave out the samples that have them",
            )


def load_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Load an exported TorchScript file to run it.

    Raises:
        ArtifactError: no such file, not one of ours, or one that this build of torch cannot run.
    """
    return Artifact(read_bytes(path), f"artifact {os.fspath(path)!r}")


def run_all(data: bytes, inputs: list[np.ndarray], where: str = "artifact") -> dict[str, np.ndarray]:
    """Run an artifact and keep every variable in it.

    Returns:
        By tensor id, what the variable held: codes as int8 of the integer model, anything else as it is.
    """
    archive = decode(data, where)
    program = parse(archive, where)
    described = facts(archive, where)
    kept = encode(dataclasses.replace(archive, code=_keeping(archive, program)))
    module = loaded(kept, described["target"], where)
    with torch.no_grad():
        values = module(*(torch.from_numpy(np.ascontiguousarray(v)) for v in inputs))
    names = [*program.inputs, *(s.name for s in program.statements)]
    tensors = described["tensors"]
    plain = [v.int_repr() if v.is_quantized else v for v in values]
    found = {tensors[n]["id"]: v.numpy() for n, v in zip(names, plain, strict=True) if n in tensors}
    return {i: as_codes(v) for i, v in found.items()}


def run_each(
    data: bytes, inputs: list[np.ndarray], kinds: tuple[str, ...], given: list[np.ndarray], where: str = "artifact"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Run each computing statement of an artifact on given integers instead of those of the statement before it.

    Args:
        data: the file, with oneDNN's kernels.
        inputs: of the model.
        kinds: the last names of the functions that compute; every other statement moves what it reads.
        given: what each computing statement should have given, in order: what is read further on.

    Returns:
        For each computing statement, its result (uint8) and what was given for it.
    """
    archive = decode(data, where)
    program = parse(archive, where)
    found = {s.name: {dotted(c.func).split(".")[-1] for c in calls(s.expression)} for s in program.statements}
    names = [name for name, functions in found.items() if functions & set(kinds)]
    if len(names) != len(given):
        raise ArtifactError(
            where, f"{len(given)} statements that compute", len(names), "Give one array for each of them"
        )
    places = {name: i for i, name in enumerate(names)}
    lines = []
    for statement in program.statements:
        lines.append(f"{statement.name} = {ast.unparse(statement.expression)}")
        if statement.name in places:
            at = places[statement.name]
            lines += [f"kept_{at} = {statement.name}", f"{statement.name} = torch.clone(given[{at}])"]
    arguments = "".join(f", {n}: Tensor" for n in program.inputs) + ", given: List[Tensor]"
    result = f"return [{', '.join(f'kept_{i}' for i in range(len(names)))}]"
    code = _with_forward(archive, arguments, [*lines, result])
    module = loaded(encode(dataclasses.replace(archive, code=code)), facts(archive, where)["target"], where)
    tensors = [torch.from_numpy(g) for g in given]
    layout = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
    with torch.no_grad():
        made = module(*map(torch.from_numpy, inputs), layout)
    return [(m.numpy(), g) for m, g in zip(made, given, strict=True)]


def as_fed(values: list[np.ndarray], ids: Iterable[str], model: IntegerModel) -> list[np.ndarray]:
    """Real inputs as a file takes them: as uint8 codes where its input tensor, of that id, holds codes."""
    grids = [model.tensors[i].affine for i in ids]
    return [v if a is None else unsigned(a.quantize(v)) for v, a in zip(values, grids, strict=True)]


def as_codes(value: np.ndarray) -> np.ndarray:
    """uint8 codes as those of the integer model."""
    return (value.astype(np.int16) - SHIFT_OF_CODES).astype(np.int8) if value.dtype == np.uint8 else value


def _keeping(archive: Archive, program: Program) -> str:
    """The code with a `forward` that returns a copy of every variable, since kernels may write into their inputs."""
    names = [*program.inputs, *(s.name for s in program.statements)]
    lines = [f"{s.name} = {ast.unparse(s.expression)}" for s in program.statements]
    first = len(program.inputs)
    kept = [f"kept_{i} = torch.clone({n})" for i, n in enumerate(names)]
    body = kept[:first] + [line for pair in zip(lines, kept[first:], strict=True) for line in pair]
    arguments = "".join(f", {n}: Tensor" for n in program.inputs)
    result = f"return [{', '.join(f'kept_{i}' for i in range(len(names)))}]"
    return _with_forward(archive, arguments, [*body, result])


def _with_forward(archive: Archive, arguments: str, body: list[str]) -> str:
    """The code with another `forward`, which gives a list of tensors."""
    tree = ast.parse(archive.code)
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef))
    forward = next(n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == "forward")
    head = f"def forward(self: {MODULE}.{CLASS}{arguments}) -> List[Tensor]:"
    text = "\n".join([head, *(f"  {line}" for line in body)])
    owner.body[owner.body.index(forward)] = ast.parse(text).body[0]
    return f"{ast.unparse(tree)}\n"
