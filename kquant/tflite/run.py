"""Runs a `.tflite` file on the stock LiteRT interpreter: `load_artifact` for a user, `run_all` for verification.

The interpreter is imported when a file is loaded, not when this module is.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kquant.core.affine import round_half_up
from kquant.core.errors import ArtifactError, check_choice, nearest
from kquant.core.files import read_bytes
from kquant.tflite.flatbuffer import RAW_BITS, FileModel, FileTensor, decode, encode

Outputs = np.ndarray | list[np.ndarray] | dict[str, np.ndarray]
# Kernel sets by our names; the values are members of LiteRT's OpResolverType.
KERNELS = {"default": "AUTO", "builtin": "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "reference": "BUILTIN_REF"}
LARGEST_BATCH = 256  # samples run at once where the file leaves it to us: bounds the interpreter's memory


@dataclass(frozen=True)
class Port:
    """An input or output of the file: its signature name, tensor index and tensor."""

    name: str
    index: int
    tensor: FileTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with -1 for what the file leaves open."""
        return self.tensor.signature or self.tensor.shape

    @property
    def quantized(self) -> bool:
        """Whether its integers stand for real values."""
        return self.tensor.scale is not None and self.tensor.dtype in ("int8", "uint8", "int16")

    def encode(self, x: Any, where: str) -> np.ndarray:
        """What the tensor holds for real values `x`: codes `floor(x/s + 0.5) + zp`, saturated, if it is quantized."""
        where = f"{where}, input {self.name!r}"
        if self.tensor.dtype in RAW_BITS or self.tensor.dtype == "int4":
            fix = "Run the file with the LiteRT interpreter itself"
            raise ArtifactError(where, "an input of a type that numpy has is expected", self.tensor.dtype, fix)
        fix = "Convert the input to an array of finite numbers"
        try:
            array = np.asarray(x)
        except (ValueError, TypeError) as e:
            raise ArtifactError(where, "an array is expected", e, fix) from e
        if array.dtype.kind not in "biuf":
            raise ArtifactError(where, "an array of numbers is expected", f"dtype {array.dtype}", fix)
        self._check_shape(array.shape, where)
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ArtifactError(where, "values must not be NaN", f"{int(np.isnan(array).sum())} NaN", fix)
        dtype = np.dtype(self.tensor.dtype)
        if self.quantized:
            info = np.iinfo(dtype)
            codes = (
                round_half_up(array.astype(np.float64) / np.float64(self.tensor.scale[0])) + self.tensor.zero_point[0]
            )
            return np.clip(codes, info.min, info.max).astype(dtype)
        if dtype.kind in "iu" and array.size:
            info, fraction = np.iinfo(dtype), array.dtype.kind == "f" and (array != np.floor(array)).any()
            if fraction or array.min() < info.min or array.max() > info.max:
                received = f"{array.dtype} from {array.min()} to {array.max()}"
                raise ArtifactError(
                    where, f"whole numbers that {dtype} holds are expected", received, "Convert the input to that type"
                )
        return array.astype(dtype)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Real values of a quantized tensor's codes; anything else passes through."""
        if not self.quantized:
            return codes
        return (codes.astype(np.int32) - np.int32(self.tensor.zero_point[0])).astype(np.float32) * self.tensor.scale[0]

    def _check_shape(self, shape: tuple[int, ...], where: str) -> None:
        expected = self.shape
        rest_fits = len(shape) == len(expected) and all(
            e in (-1, n) for e, n in zip(expected[1:], shape[1:], strict=True)
        )
        if not rest_fits:
            raise ArtifactError(
                where,
                f"shape {_batched(expected)} is expected",
                shape,
                "Give a batch of that shape; a single sample as x[None]",
            )
        if shape and shape[0] == 0:
            raise ArtifactError(where, "at least one sample is expected", shape, "Leave empty batches out")


def _batched(shape: Sequence[int]) -> str:
    return "(" + ", ".join(["batch"] * bool(shape) + ["any" if n < 0 else str(n) for n in shape[1:]]) + ")"


def load_artifact(path: str | os.PathLike[str], *, num_threads: int = 1, kernels: str = "default") -> Artifact:
    """Load a `.tflite` file to run it.

    Args:
        path: the file.
        num_threads: of the interpreter.
        kernels: `"default"` (XNNPACK), `"builtin"` (without the delegate), `"reference"`.

    Raises:
        ArtifactError: no such file, not a whole TFLite file, or one that the interpreter cannot load.
    """
    return Artifact(read_bytes(path), f"artifact {os.fspath(path)!r}", num_threads=num_threads, kernels=kernels)


class Artifact:
    """A file that runs like a function, on real values: it quantizes its inputs and dequantizes its outputs.

    `inputs` and `outputs` are its `Port`s.

    Example:
        >>> from kquant.tflite.flatbuffer import FileModel, FileOp, FileTensor
        >>> x, y = (FileTensor(name, (1, 2), "float32", signature=(-1, 2)) for name in "xy")
        >>> relu = encode(FileModel([x, y], [FileOp("RELU", (0,), (1,))], (0,), (1,)))
        >>> Artifact(relu)([[-1.0, 2.0]])
        array([[0., 2.]], dtype=float32)
    """

    def __init__(self, data: bytes, where: str = "artifact", *, num_threads: int = 1, kernels: str = "default"):
        self._session = _Session(data, decode(data, where), where, num_threads, kernels)
        self.inputs, self.outputs = self._session.inputs, self._session.outputs

    def __call__(self, x: Any) -> Outputs:
        """Run it.

        Args:
            x: an array; for several inputs a list of arrays in the file's order, or a dict by signature name. The first
                axis is the batch, of any length: a file of a fixed batch is run again and again. Values are real, also
                where the file's input is int8 (integers are numbers, not codes); integer inputs without a scale take
                whole numbers.

        Returns:
            float32 for quantized outputs, else the output's dtype: an array, or for several outputs a list (a dict by
            signature name if `x` is a dict).

        Raises:
            ArtifactError: a wrong number of inputs, unknown name, shape, NaN, a value that an integer input cannot
                hold; an interpreter that fails.
        """
        raw = self._session.run(self._session.feeds(x))
        values = {p.name: p.decode(raw[p.index]) for p in self.outputs}
        if len(self.outputs) == 1:
            return values[self.outputs[0].name]
        return values if isinstance(x, Mapping) else [values[p.name] for p in self.outputs]


def run_all(
    data: bytes, feeds: Any, *, kernels: str = "default", num_threads: int = 1, where: str = "artifact"
) -> dict[str, np.ndarray]:
    """Run a file and keep every value in it, as it lies in the integer tensors.

    Every op's output becomes an output of the file, so that the default delegate still runs and nothing is overwritten.

    Args:
        data: the file's bytes, of one subgraph.
        feeds: real values, as `Artifact` takes them.
        kernels, num_threads: as `load_artifact`.
        where: names the file in errors.

    Returns:
        By tensor name (a repeated name gets `#index`): the inputs' and all ops' outputs, raw. A file of a dynamic batch
        runs at the feeds' batch; one of a fixed batch runs in chunks whose values are joined along the first axis.

    Raises:
        ArtifactError: as `Artifact`; several subgraphs; a number of samples that a fixed batch does not divide.
    """
    model = decode(data, where)
    if model.other_subgraphs:
        raise ArtifactError(
            where,
            "a file of one subgraph is expected",
            f"{model.other_subgraphs + 1} subgraphs",
            "Only files of kquant.export_tflite are run op by op",
        )
    computed = dict.fromkeys([*model.outputs, *(i for op in model.ops for i in op.outputs)])
    keys: dict[int, str] = {}
    for i in (*model.inputs, *computed):
        name = model.tensors[i].name
        keys[i] = f"{name}#{i}" if name in keys.values() and i not in keys else name
    has_signature = model.input_names or model.output_names
    wide = dataclasses.replace(
        model, outputs=tuple(computed), output_names=tuple(map(str, computed)) if has_signature else ()
    )
    session = _Session(encode(wide), wide, where, num_threads, kernels)
    codes = session.feeds(feeds)
    raw = {p.index: x for p, x in zip(session.inputs, codes, strict=True)} | session.run(codes, whole=True)
    return {keys[i]: raw[i] for i in keys}


class _Session:
    """An interpreter and what is needed to feed it."""

    def __init__(self, data: bytes, model: FileModel, where: str, num_threads: int, kernels: str):
        check_choice("kernels", kernels, KERNELS, ArtifactError)
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.where = where
        self.inputs = _ports(model, model.inputs, model.input_names)
        self.outputs = _ports(model, model.outputs, model.output_names)
        self._make = functools.partial(
            Interpreter,
            model_content=data,
            num_threads=num_threads,
            experimental_op_resolver_type=getattr(OpResolverType, KERNELS[kernels]),
        )
        self._interpreter = self._guard(self._make)
        self._shapes: tuple[tuple[int, ...], ...] | None = None

    def feeds(self, x: Any) -> list[np.ndarray]:
        """What the input tensors hold for `x`, in the file's order, whole."""
        names = [p.name for p in self.inputs]
        if isinstance(x, Mapping):
            for name in x:
                if name not in names:
                    raise ArtifactError(
                        self.where, f"inputs are named {nearest(str(name), names)}", repr(name), "Use that name"
                    )
            missing = [n for n in names if n not in x]
            if missing:
                raise ArtifactError(
                    self.where,
                    f"a value for each of {names} is expected",
                    f"none for {missing}",
                    "Give every input by that name",
                )
            values = [x[n] for n in names]
        else:
            several = isinstance(x, list | tuple) and (len(names) != 1 or self._is_one_input(x))
            values = list(x) if several else [x]
        if len(values) != len(names):
            raise ArtifactError(
                self.where,
                f"{len(names)} inputs are expected: {names}",
                f"{len(values)} inputs",
                "Pass a list in that order, or a dict by name",
            )
        codes = [p.encode(v, self.where) for p, v in zip(self.inputs, values, strict=True)]
        if len({p.shape[:1] for p in self.inputs}) == 1 and len({c.shape[:1] for c in codes}) > 1:
            counts = {p.name: len(c) for p, c in zip(self.inputs, codes, strict=True)}
            raise ArtifactError(
                self.where,
                "all inputs must have the same number of samples",
                counts,
                "Give every input the same first axis",
            )
        return codes

    def _is_one_input(self, x: Sequence[Any]) -> bool:
        """Whether a list holds the file's one input, rather than being an array written as a list."""
        return len(x) == 1 and getattr(x[0], "shape", None) is not None and len(x[0].shape) == len(self.inputs[0].shape)

    def run(self, codes: list[np.ndarray], whole: bool = False) -> dict[int, np.ndarray]:
        """Raw outputs by tensor index. `whole`: a dynamic batch is not split, a fixed one not padded."""
        samples = codes[0].shape[0] if codes and codes[0].ndim else 1
        size = self._chunk(codes, samples, whole)
        if size == samples:
            return self._invoke(codes)
        parts = []
        for start in range(0, samples, size):
            part = [c[start : start + size] for c in codes]
            missing = size - part[0].shape[0]
            if missing and self.inputs[0].shape[0] != -1:  # a fixed batch: fill the last one up, cut it off below
                part = [np.concatenate([p, np.repeat(p[-1:], missing, axis=0)]) for p in part]
            parts.append(self._invoke(part))
        joined = {i: np.concatenate([np.atleast_1d(p[i]) for p in parts]) for i in parts[0]}
        return joined if whole else {i: v[:samples] for i, v in joined.items()}

    def _chunk(self, codes: list[np.ndarray], samples: int, whole: bool) -> int:
        """How many samples go in at once; inputs without a common batch go in as they are."""
        expected = [p.shape[:1] for p in self.inputs]
        split = {p.shape[:1] for p in self.outputs} == set(expected)  # else the outputs' first axis is no batch
        if set(expected) == {(-1,)}:
            return min(samples, LARGEST_BATCH) if split and not whole else samples
        if all(e in ((-1,), c.shape[:1]) for e, c in zip(expected, codes, strict=True)):
            return samples
        if len(set(expected)) != 1 or not (split or whole):
            shapes = [p.shape for p in self.inputs]
            raise ArtifactError(
                self.where,
                f"exactly the shapes {shapes} are expected",
                [c.shape for c in codes],
                "The file has a fixed batch: give arrays of these shapes",
            )
        if whole and samples % expected[0][0]:
            raise ArtifactError(
                self.where,
                f"a multiple of its batch of {expected[0][0]} is expected",
                samples,
                "Pad the batch, or export the model without a fixed batch size",
            )
        return expected[0][0]

    def _invoke(self, codes: list[np.ndarray]) -> dict[int, np.ndarray]:
        shapes = tuple(c.shape for c in codes)
        if shapes != self._shapes:
            self._shapes = None  # stays None if allocation fails
            for port, code in zip(self.inputs, codes, strict=True):
                if -1 in port.shape:
                    self._guard(lambda i=port.index, s=code.shape: self._interpreter.resize_tensor_input(i, s))
            self._guard(self._interpreter.allocate_tensors)
            self._shapes = shapes
        for port, code in zip(self.inputs, codes, strict=True):
            self._guard(lambda i=port.index, c=code: self._interpreter.set_tensor(i, c))
        self._guard(self._interpreter.invoke)
        return {p.index: self._guard(lambda i=p.index: self._interpreter.get_tensor(i)) for p in self.outputs}

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError, MemoryError) as e:
            fix = "Its ops must be in the stock runtime; kquant.audit lists them with the runtime they need"
            raise ArtifactError(self.where, "the LiteRT interpreter must be able to run it", e, fix) from e


def _ports(model: FileModel, indices: Sequence[int], names: Sequence[str]) -> tuple[Port, ...]:
    """Ports by signature name; a file without a signature names them by tensor."""
    named = names or [model.tensors[i].name for i in indices]
    return tuple(Port(n, i, model.tensors[i]) for n, i in zip(named, indices, strict=True))
