"""The `config_list` grammar: one for every front end, so no framework appears here.

`parse` checks all that can be checked without a model; `match` then binds the entries to a model's ops. The form is
that of NNI's compressor (October 2019) with the spellings of its later releases.
"""

from __future__ import annotations

import fnmatch
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kquant.core.errors import ConfigError, nearest

QUANTIZERS = ("naive", "qat", "dorefa")
FLOAT_BITS = 32
DEFAULT_BITS = 8

_SELECTORS = ("op_types", "op_names")
_SETTINGS = ("q_bits", "quant_bits", "quant_types", "quant_scheme", "quant_dtype", "quant_start_step")
_ALL = 'Pass None, or [{"q_bits": 8, "op_types": ["default"]}], to quantize all that the target can run'
_KEYS = (*_SELECTORS, *_SETTINGS, "quantizer", "exclude")
_TYPES = ("weight", "input", "output")
_DEFAULT_TYPES = ("weight", "output")
_ROLES = (*_TYPES, "gradient")
_SCHEMES = {
    prefix + scheme: scheme
    for prefix in ("", "per_")
    for scheme in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric")
}
_DTYPES = ("int", "uint")

_LOW = tuple(range(1, 9))
_ACTIVATION_BITS = (*_LOW, 16, FLOAT_BITS)
# What each quantizer can do, by role. Zhou et al. 2016 define one-bit weights and quantized gradients; the symmetric
# grid of the other two has a single code at one bit. Whether one-bit outputs are non-negative only the plan can tell.
_ALLOWED_BITS: dict[str, dict[str, tuple[int, ...]]] = {
    name: {
        "weight": (*(_LOW if name == "dorefa" else _LOW[1:]), FLOAT_BITS),
        "input": _ACTIVATION_BITS,
        "output": _ACTIVATION_BITS,
        "gradient": (*_LOW, FLOAT_BITS) if name == "dorefa" else (FLOAT_BITS,),
    }
    for name in QUANTIZERS
}


@dataclass(frozen=True)
class Entry:
    """One entry of a `config_list`, checked.

    Args:
        index: position in the list.
        op_types, op_names: the selectors as tuples of strings; None if the entry does not have that selector.
        weight_bits, output_bits, input_bits: number of bits; 32 is float; None is "not quantized by this entry".
        gradient_bits: number of bits of DoReFa's gradients; 32 and None leave them alone.
        quantizer: "naive", "qat" or "dorefa".
        exclude: the matched ops stay float; all bits are None then.
        start_step: training steps that only observe before quantization begins.
        weight_per_channel: one scale per output channel (True), one per tensor (False), the quantizer's own (None).
        output_symmetric, input_symmetric: whether the zero point is held at 0 (`tensor_symmetric`).
        bits_key: the key that the user wrote, "q_bits" or "quant_bits", for later messages.

    Example:
        >>> entry, = parse([{"q_bits": {"weight": 4, "output": 8}, "op_names": ["block*"]}])
        >>> entry.weight_bits, entry.output_bits, entry.input_bits
        (4, 8, None)
        >>> entry.matches(["block1/conv"], "Conv2D", is_default=True)
        True
    """

    index: int
    op_types: tuple[str, ...] | None = None
    op_names: tuple[str, ...] | None = None
    weight_bits: int | None = None
    output_bits: int | None = None
    input_bits: int | None = None
    gradient_bits: int | None = None
    quantizer: str = "qat"
    exclude: bool = False
    start_step: int = 0
    weight_per_channel: bool | None = None
    output_symmetric: bool = False
    input_symmetric: bool = False
    bits_key: str = field(default="q_bits", compare=False)

    def where(self, key: str) -> str:
        """How an error names a key of this entry: ``config_list[0]['q_bits']``."""
        return f"config_list[{self.index}][{key!r}]"

    def matches(self, names: Sequence[str], type_name: str, is_default: bool) -> bool:
        """Whether this entry selects an op; with both selectors given, both have to.

        Args:
            names: every name the op answers to (its full path, its layer name); one is enough.
            type_name: the framework's class name, compared exactly.
            is_default: whether the target can run the op in integers, which is what "default" selects.
        """
        if self.op_types is not None and not any(_type_selects(t, type_name, is_default) for t in self.op_types):
            return False
        aliases = (names,) if isinstance(names, str) else names
        return self.op_names is None or any(_name_selects(p, name) for p in self.op_names for name in aliases)


@dataclass(frozen=True)
class Candidate:
    """What `match` has to know of an op: its unique id, all names it answers to, its type, is it in "default"."""

    id: str
    aliases: tuple[str, ...]
    type_name: str
    is_default: bool


@dataclass(frozen=True)
class _Raw:
    """An entry as the user wrote it, and its place in the list."""

    index: int
    values: Mapping[str, Any]

    def where(self, *keys: str) -> str:
        return f"config_list[{self.index}]" + "".join(f"[{key!r}]" for key in keys)

    def error(self, keys: Sequence[str], expected: str, received: object, fix: str = "") -> ConfigError:
        return ConfigError(self.where(*keys), expected, repr(received), fix)


def parse(config_list: Any, *, quantizer: str | None = None) -> tuple[Entry, ...]:
    """Check a `config_list` and return its entries in order.

    Args:
        config_list: a list or tuple of dicts as in DESIGN.md; None means 8 bits for every op of "default".
        quantizer: set by the quantizer classes; it then applies to every entry, and an entry may not name another.

    Raises:
        ConfigError: names ``config_list[i]['key']``, what was expected and received, and the nearest valid spelling.

    Example:
        >>> parse(None) == parse([{"q_bits": 8, "op_types": ["default"]}])
        True
        >>> parse([{"exclude": 1, "op_types": "default"}])
        Traceback (most recent call last):
        kquant.core.errors.ConfigError: config_list[0]['exclude']: expected True or False. Received: 1
    """
    if quantizer is not None and quantizer not in QUANTIZERS:
        raise ConfigError(
            "quantizer", f"expected one of {QUANTIZERS}", repr(quantizer), _did_you_mean(quantizer, QUANTIZERS)
        )
    if config_list is None:
        config_list = [{"q_bits": DEFAULT_BITS, "op_types": ["default"]}]
    if isinstance(config_list, Mapping):
        raise ConfigError("config_list", "expected a list of dicts", repr(config_list), "Put the dict in a list: [...]")
    if not isinstance(config_list, (list, tuple)):
        raise ConfigError("config_list", "expected a list of dicts or None", repr(config_list), _ALL)
    if not config_list:
        raise ConfigError("config_list", "expected at least one entry", repr(config_list), _ALL)
    return tuple(_parse_entry(index, values, quantizer) for index, values in enumerate(config_list))


def match(entries: Sequence[Entry], ops: Iterable[Candidate]) -> dict[str, Entry | None]:
    """The last matching entry of every op, by op id; None where no entry matches.

    Raises:
        ConfigError: for an entry that matches no op, and for a type name or name pattern that matches none.

    Example:
        >>> ops = [Candidate("c", ("conv",), "Conv2D", True), Candidate("d", ("head",), "Dense", True)]
        >>> entries = parse([{"op_types": "default"}, {"op_names": "head", "q_bits": 4}])
        >>> {op: entry.index for op, entry in match(entries, ops).items()}
        {'c': 0, 'd': 1}
    """
    ops = tuple(ops)
    for entry in entries:
        _check_selects(entry, ops)
    return {
        op.id: next((e for e in reversed(entries) if e.matches(op.aliases, op.type_name, op.is_default)), None)
        for op in ops
    }


def _type_selects(wanted: str, type_name: str, is_default: bool) -> bool:
    return is_default if wanted == "default" else wanted == type_name


def _name_selects(pattern: str, name: str) -> bool:
    # Equality first: a layer may be called "block[0]", which as a pattern means "block0".
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


def _check_selects(entry: Entry, ops: Sequence[Candidate]) -> None:
    types = {op.type_name for op in ops}
    names = {alias for op in ops for alias in op.aliases}
    misses = [("op_types", t, types | {"default"}) for t in entry.op_types or () if t != "default" and t not in types]
    for pattern in entry.op_names or ():
        if not any(_name_selects(pattern, name) for name in names):
            misses.append(("op_names", pattern, names))
    if misses:
        fix = "; ".join(f"{key} names {name!r}, did you mean {nearest(name, known)}" for key, name, known in misses)
        received = ", ".join(repr(name) for _, name, _ in misses)
        raise ConfigError(entry.where(misses[0][0]), "expected names that exist in the model", received, fix)
    if any(entry.matches(op.aliases, op.type_name, op.is_default) for op in ops):
        return
    if entry.op_types is not None and entry.op_names is not None:
        matched = [op for op in ops if any(_name_selects(p, a) for p in entry.op_names for a in op.aliases)]
        fix = "op_names selects only " + ", ".join(f"{op.aliases[0]!r} ({op.type_name})" for op in matched[:6])
        expected = "expected at least one op that both op_types and op_names select"
        raise ConfigError(entry.where("op_types"), expected, f"{entry.op_types} and {entry.op_names}", fix)
    fix = f"The model has {', '.join(sorted(types)) or 'no ops'}"
    raise ConfigError(entry.where("op_types"), "no op of the model is in 'default'", f"{entry.op_types}", fix)


def _parse_entry(index: int, values: Any, implied: str | None) -> Entry:
    if not isinstance(values, Mapping):
        raise ConfigError(f"config_list[{index}]", "expected a dict", repr(values), _ALL)
    raw = _Raw(index, values)
    for key in values:
        if key not in _KEYS:
            raise raw.error([key], "unknown key", key, _did_you_mean(key, _KEYS))
    op_types, op_names = _names(raw, "op_types"), _names(raw, "op_names")
    if op_types is None and op_names is None:
        fix = 'Add one; "op_types": ["default"] selects all that the target can run in integers'
        raise raw.error((), "expected 'op_types' or 'op_names'", dict(values), fix)
    quantizer = _quantizer(raw, implied)
    if _exclude(raw):
        return Entry(index, op_types, op_names, quantizer=quantizer, exclude=True)
    bits = _bits(raw, quantizer)
    types = tuple(t for t in _TYPES if t in bits)
    schemes = _schemes(raw, types, bits, quantizer)
    _check_dtypes(raw, types)
    return Entry(
        index,
        op_types,
        op_names,
        weight_bits=bits.get("weight"),
        output_bits=bits.get("output"),
        input_bits=bits.get("input"),
        gradient_bits=bits.get("gradient"),
        quantizer=quantizer,
        start_step=_start_step(raw),
        weight_per_channel={"channel_symmetric": True, "tensor_symmetric": False}.get(schemes.get("weight", "")),
        output_symmetric=schemes.get("output") == "tensor_symmetric",
        input_symmetric=schemes.get("input") == "tensor_symmetric",
        bits_key="q_bits" if "q_bits" in values or "quant_bits" not in values else "quant_bits",
    )


def _names(raw: _Raw, key: str) -> tuple[str, ...] | None:
    if key not in raw.values:
        return None
    value = raw.values[key]
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
        raise raw.error([key], "expected a name or a list with at least one name", value)
    return tuple(names)


def _quantizer(raw: _Raw, implied: str | None) -> str:
    value = raw.values.get("quantizer", implied or "qat")
    if value not in QUANTIZERS:
        raise raw.error(["quantizer"], f"expected one of {QUANTIZERS}", value, _did_you_mean(value, QUANTIZERS))
    if implied is not None and value != implied:
        expected = f"the entry says {value!r}, but the quantizer it was given to is {implied!r}"
        raise raw.error(["quantizer"], expected, value, "Drop the key, or use quantize_model, which takes it per entry")
    return str(value)


def _exclude(raw: _Raw) -> bool:
    value = raw.values.get("exclude", False)
    if not isinstance(value, bool):
        raise raw.error(["exclude"], "expected True or False", value)
    if not value:
        return False
    for key in raw.values:
        says_float = key in ("q_bits", "quant_bits") and raw.values[key] == FLOAT_BITS
        if key in _SETTINGS and not says_float:
            expected = f"'exclude': True leaves the ops float, which contradicts {key!r}: {raw.values[key]!r}"
            raise raw.error(["exclude"], expected, dict(raw.values), "Keep one of the two")
    return True


def _quant_types(raw: _Raw) -> tuple[str, ...] | None:
    types = _names(raw, "quant_types")
    for name in types or ():
        if name not in _TYPES:
            fix = _did_you_mean(name, _TYPES)
            if name == "gradient":
                fix = 'Gradients are set by "q_bits": {"gradient": ...}'
            raise raw.error(["quant_types"], f"expected a subset of {list(_TYPES)}", name, fix)
    return types


def _bits(raw: _Raw, quantizer: str) -> dict[str, int]:
    """Bits of every role the entry quantizes, from `quant_types`, `q_bits` and its later spelling `quant_bits`."""
    types = _quant_types(raw)
    stated = {k: _stated_bits(raw, k, types, quantizer) for k in ("q_bits", "quant_bits") if k in raw.values}
    given: dict[str, int] = {}
    for key, roles in stated.items():
        for role, count in roles.items():
            if given.setdefault(role, count) != count:
                expected = f"'q_bits' and 'quant_bits' are one setting, but give {given[role]} and {count} to {role!r}"
                raise raw.error([key], expected, raw.values[key], "Keep one of the two")
            if types is not None and role not in (*types, "gradient"):
                expected = f"{key!r} sets {role!r}, but 'quant_types' is {list(types)}"
                raise raw.error([key], expected, raw.values[key], f"Add {role!r} to 'quant_types' or drop its bits")
    return {**dict.fromkeys(types or _DEFAULT_TYPES, DEFAULT_BITS), **given}


def _stated_bits(raw: _Raw, key: str, types: tuple[str, ...] | None, quantizer: str) -> dict[str, int]:
    value = raw.values[key]
    if not isinstance(value, Mapping):
        return {role: _count(raw, [key], role, value, quantizer) for role in types or _DEFAULT_TYPES}
    if not value:
        raise raw.error([key], f"expected a number of bits or a dict with some of {_ROLES}", value)
    for role in value:
        if role not in _ROLES:
            raise raw.error([key], f"expected the keys {_ROLES}", role, _did_you_mean(str(role), _ROLES))
    return {role: _count(raw, [key, role], role, count, quantizer) for role, count in value.items()}


def _count(raw: _Raw, keys: Sequence[str], role: str, value: Any, quantizer: str) -> int:
    allowed = _ALLOWED_BITS[quantizer][role]
    if _is_int(value) and value in allowed:
        return int(value)
    choices = ", ".join(map(str, allowed[:-1]))
    expected = f"expected {role} bits among {choices + ' or ' if choices else ''}32 (float) for {quantizer!r}"
    fix = ""
    if role == "gradient" and quantizer != "dorefa":
        fix = 'Only "quantizer": "dorefa" quantizes gradients'
    elif role == "weight" and _is_int(value) and value == 1:
        fix = 'One-bit weights are DoReFa\'s: "quantizer": "dorefa"'
    elif role == "weight" and _is_int(value) and value == 16:
        fix = 'Only activations can have 16 bits: {"weight": 8, "output": 16}'
    raise raw.error(keys, expected, value, fix)


def _by_type(raw: _Raw, key: str, types: Sequence[str], known: Iterable[str]) -> dict[str, tuple[list[str], str]]:
    """A setting given once or by type, as {type: (path of keys for an error, value)}."""
    if key not in raw.values:
        return {}
    value, known = raw.values[key], tuple(known)
    if isinstance(value, Mapping):
        for role in value:
            if role not in types:
                expected = f"expected keys among the types this entry quantizes, {list(types)}"
                raise raw.error([key], expected, role, f"Add {role!r} to 'quant_types' or drop it here")
        settings = {role: ([key, role], setting) for role, setting in value.items()}
    else:
        settings = {role: ([key], value) for role in types}
    for path, setting in settings.values():
        if not isinstance(setting, str) or setting not in known:
            raise raw.error(path, f"expected one of {known}", setting, _did_you_mean(setting, known))
    return settings


def _schemes(raw: _Raw, types: Sequence[str], bits: Mapping[str, int], quantizer: str) -> dict[str, str]:
    schemes = {}
    fix = 'Give them apart: {"weight": "channel_symmetric", "output": "tensor_affine"}'
    for role, (path, spelled) in _by_type(raw, "quant_scheme", types, _SCHEMES).items():
        scheme = schemes[role] = _SCHEMES[spelled]
        if role == "weight" and scheme.endswith("affine"):
            raise raw.error(path, "the kernels take symmetric weights only (zero point 0)", spelled, fix)
        if role != "weight" and scheme.startswith("channel"):
            raise raw.error(path, f"the kernels take one scale for the whole {role} only", spelled, fix)
        if role != "weight" and scheme == "tensor_symmetric" and bits[role] == 1:
            raise raw.error(path, f"a one-bit {role} has no symmetric codes", spelled, "Write 'tensor_affine'")
        if role == "weight" and quantizer == "dorefa" and scheme == "channel_symmetric":
            expected = "'quantizer': 'dorefa' takes the maximum over the whole layer (Zhou et al. 2016, eq. 9)"
            raise raw.error(path, expected, spelled, "Drop the weight's scheme or choose 'qat'")
    return schemes


def _check_dtypes(raw: _Raw, types: Sequence[str]) -> None:
    for role, (path, dtype) in _by_type(raw, "quant_dtype", types, _DTYPES).items():
        # An asymmetric int8 activation has the same 2^k levels as a uint8 one, so "uint" loses nothing there.
        if role == "weight" and dtype == "uint":
            fix = 'Write {"weight": "int", "output": "uint"}'
            raise raw.error(path, "the kernels take signed weights only, 'int'", dtype, fix)


def _start_step(raw: _Raw) -> int:
    value = raw.values.get("quant_start_step", 0)
    if not _is_int(value) or value < 0:
        raise raw.error(["quant_start_step"], "expected a number of training steps, 0 or more", value)
    return int(value)


def _is_int(value: Any) -> bool:
    # bool is an int to Python, but "q_bits": True is a mistake, not one bit.
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _did_you_mean(name: object, known: Iterable[str]) -> str:
    return f"Did you mean {nearest(str(name), known)}"
