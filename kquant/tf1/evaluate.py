"""Run parts of a graph on concrete arrays, in a graph and a session of their own.

The nodes are the trained graph's own, with their attributes; what is cut off around them is fed: data, the values of
variables, and the moving statistics in the place of batch statistics. Nothing of the user's graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2, node_def_pb2

from kquant.tf1 import marks
from kquant.tf1.flags import decides_on_more, evaluated, is_flag
from kquant.tf1.values import Values, variable_of

BATCH_NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
_GATHERS = ("ResourceGather",)
_RESIZES = ("ResizeBilinear", "ResizeNearestNeighbor")
_TRANSPOSED = "Conv2DBackpropInput"


@dataclass(frozen=True)
class _Island:
    """A part of the graph as it was imported: a tensor to feed for each name, and what to fetch."""

    feeds: dict[str, Any]
    variables: dict[str, Any]
    fetches: list[Any]


@dataclass
class _Nodes:
    """The nodes of an island while it is collected."""

    nodes: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # of a placeholder's name, the variable's
    todo: list[Any] = field(default_factory=list)


class Evaluator:
    """Evaluates tensors of a graph from given values of other tensors.

    Args:
        graph: the user's graph.
        values: of its variables.
        statistics: for a batch statistic (tensor name), the variable op that holds its moving average.
    """

    def __init__(self, graph: Any, values: Values, statistics: Mapping[str, str]):
        self._session: Any = None
        self.graph, self.values, self.statistics = graph, values, statistics
        self._islands: dict[Any, _Island] = {}
        self._behind = marks.standing_for(graph, marks.TRANSPARENT)
        self._known: dict[Any, list[np.ndarray]] = {}
        self._functions: dict[Any, tuple[list[Any], list[Any]]] = {}
        self._own = tf.Graph()

    def run(
        self,
        feeds: Mapping[str, Any],
        fetches: Sequence[str],
        replaced: Mapping[str, str] | None = None,
    ) -> list[np.ndarray]:
        """Values of some tensors.

        Args:
            feeds: arrays by tensor name.
            fetches: tensor names.
            replaced: tensors that are taken in the place of others, by name.
        """
        if not feeds and not replaced:
            return self._parameters(fetches)
        return self._fetch(feeds, fetches, replaced)

    def _parameters(self, fetches: Sequence[str]) -> list[np.ndarray]:
        """Values of parameters, computed again only after a variable was set."""
        key = (self.values.version, *fetches)
        if key not in self._known:
            self._known[key] = self._fetch({}, fetches, None)
        return self._known[key]

    def _fetch(
        self, feeds: Mapping[str, Any], fetches: Sequence[str], replaced: Mapping[str, str] | None
    ) -> list[np.ndarray]:
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        replaced = replaced or {}
        key = (tuple((n, a.dtype.str) for n, a in arrays.items()), tuple(fetches), tuple(replaced.items()))
        if key not in self._islands:
            self._islands[key] = self._build(arrays, fetches, replaced)
        island = self._islands[key]
        values = self.values.get(island.variables)
        table = {island.feeds[n]: a for n, a in arrays.items() if n in island.feeds}
        table.update({tensor: values[name] for name, tensor in island.variables.items()})
        return list(self._run(island.fetches, table))

    def inline(
        self,
        feeds: Mapping[str, Any],
        fetches: Sequence[str],
        variable: Callable[[str], Any] | None = None,
        name: str = "",
    ) -> list[Any]:
        """Tensors in the graph that is being built, from tensors in the place of others.

        Args:
            feeds: those tensors, by the names of the others.
            fetches: tensor names.
            variable: for a variable op's name the tensor that has its value; None for a constant of the present value.
            name: scope of the ops that are made.
        """
        dtypes = {name: np.zeros((), t.dtype.as_numpy_dtype) for name, t in feeds.items()}
        definition, names, part = self._definition(dtypes, fetches, {})
        if variable is None:
            values = self.values.get(part.variables.values())
            variable = {v: tf.constant(a) for v, a in values.items()}.__getitem__
        table = {f"{_placeholder(n)}:0": t for n, t in feeds.items() if _placeholder(n) in part.nodes}
        table |= {f"{p}:0": variable(v) for p, v in part.variables.items()}
        found: list[Any] = tf.import_graph_def(definition, input_map=table, return_elements=names, name=name)
        return found

    def apply(self, key: Any, function: Callable[..., Sequence[Any]], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run a function of tensors on arrays; it is traced once for each `key`."""
        if key not in self._functions:
            with self._own.as_default():
                feeds = [tf.compat.v1.placeholder(a.dtype, [None] * a.ndim) for a in arrays]
                self._functions[key] = feeds, list(function(*feeds))
        feeds, fetches = self._functions[key]
        return list(self._run(fetches, dict(zip(feeds, arrays, strict=True))))

    def _run(self, fetches: list[Any], table: dict[Any, Any]) -> list[np.ndarray]:
        if self._session is None:
            config = tf.compat.v1.ConfigProto()
            config.graph_options.rewrite_options.disable_meta_optimizer = True  # these parts are small
            self._session = tf.compat.v1.Session(graph=self._own, config=config)
        found: list[np.ndarray] = self._session.run(fetches, table)
        return found

    def close(self) -> None:
        """Free the session."""
        if self._session is not None:
            self._session.close()

    __del__ = close

    # -- building -------------------------------------------------------------------------------------------------

    def _definition(
        self, arrays: Mapping[str, np.ndarray], fetches: Sequence[str], replaced: Mapping[str, str]
    ) -> tuple[Any, list[str], _Nodes]:
        """The nodes between what is given and what is fetched, and the names of the latter in them."""
        part = _Nodes()
        names = [self._resolve(self.graph.get_tensor_by_name(n), arrays, replaced, part) for n in fetches]
        seen: set[str] = set()
        while part.todo:
            op = part.todo.pop()
            if op.name not in seen:
                seen.add(op.name)
                self._node(op, arrays, replaced, part)
        definition = graph_pb2.GraphDef()
        definition.node.extend(part.nodes.values())
        if any(self._calls_functions(node) for node in part.nodes.values()):
            definition.library.CopyFrom(self.graph.as_graph_def().library)
        return definition, names, part

    def _build(self, arrays: Mapping[str, np.ndarray], fetches: Sequence[str], replaced: Mapping[str, str]) -> _Island:
        definition, names, part = self._definition(arrays, fetches, replaced)
        prefix = f"part{len(self._islands)}"
        with self._own.as_default():
            tf.import_graph_def(definition, name=prefix)
        own = {name: self._own.get_tensor_by_name(f"{prefix}/{name}:0") for name in part.nodes}
        fed = {n: own[_placeholder(n)] for n in arrays if _placeholder(n) in own}
        variables = {v: own[p] for p, v in part.variables.items()}
        return _Island(fed, variables, [self._own.get_tensor_by_name(f"{prefix}/{n}") for n in names])

    @staticmethod
    def _calls_functions(node: Any) -> bool:
        return any(value.HasField("func") for value in node.attr.values()) or "Call" in node.op

    def _resolve(self, tensor: Any, arrays: Mapping[str, Any], replaced: Mapping[str, str], part: _Nodes) -> str:
        """The name under which a tensor is read inside the part; its op is noted as still to be collected."""
        while tensor.name not in arrays:
            name, chosen = replaced.get(tensor.name) or self._behind.get(tensor.name), evaluated(tensor)
            if name is None and chosen is None:
                break
            tensor = self.graph.get_tensor_by_name(name) if name is not None else chosen
        if tensor.name in arrays:
            return self._fed(_placeholder(tensor.name), arrays[tensor.name].dtype, part)
        statistic = self.statistics.get(tensor.name)
        variable = self.graph.get_operation_by_name(statistic) if statistic else variable_of(tensor)
        if variable is not None and (statistic or tensor.dtype != tf.resource):
            dtype = tf.dtypes.as_dtype(variable.get_attr("dtype")).as_numpy_dtype
            name = self._fed(_placeholder(variable.name), dtype, part)
            part.variables[name.removesuffix(":0")] = variable.name
            return name
        part.todo.append(tensor.op)
        return str(tensor.name)

    @staticmethod
    def _fed(name: str, dtype: Any, part: _Nodes) -> str:
        if name not in part.nodes:
            node = node_def_pb2.NodeDef(name=name, op="Placeholder")
            node.attr["dtype"].type = tf.dtypes.as_dtype(dtype).as_datatype_enum
            node.attr["shape"].shape.unknown_rank = True
            part.nodes[name] = node
        return f"{name}:0"

    def _node(self, op: Any, arrays: Mapping[str, Any], replaced: Mapping[str, str], part: _Nodes) -> None:
        node = node_def_pb2.NodeDef()
        node.CopyFrom(op.node_def)
        node.device = ""
        for attribute in [a for a in node.attr if a.startswith("_")]:
            del node.attr[attribute]
        inputs = list(op.inputs)
        if any(map(is_flag, op.outputs)):
            raise decides_on_more(f"{op.name!r}, which a value of the model is computed from")
        if op.type in BATCH_NORMS and op.get_attr("is_training"):
            # In inference form, on the moving averages of its batch statistics.
            node.attr["is_training"].b = False
            inputs = [*inputs[:3], *op.outputs[1:3]]
        if op.type in _GATHERS:
            table, axis = self._gather(op, node, part)
            node.input[:] = [table, self._resolve(op.inputs[1], arrays, replaced, part), axis]
        elif op.type in _RESIZES and None not in op.outputs[0].shape.as_list()[1:3]:
            # The size may be computed from the shape of data that this part does not hold.
            size = _integers(f"{op.name}/known_size", op.outputs[0].shape.as_list()[1:3], part)
            node.input[:] = [self._resolve(inputs[0], arrays, replaced, part), size]
        elif op.type == _TRANSPOSED and None not in op.outputs[0].shape.as_list()[1:]:
            kernel, x = (self._resolve(t, arrays, replaced, part) for t in inputs[1:])
            node.input[:] = [_sizes(op, x, part), kernel, x]
        else:
            node.input[:] = [self._resolve(t, arrays, replaced, part) for t in inputs]
        part.nodes[op.name] = node

    def _gather(self, op: Any, node: Any, part: _Nodes) -> tuple[str, str]:
        """Make a look-up straight in a resource one in its value; returns the names of the table and the axis."""
        variable = variable_of(op.inputs[0])
        dtype = tf.dtypes.as_dtype(variable.get_attr("dtype"))
        table = self._fed(_placeholder(variable.name), dtype.as_numpy_dtype, part)
        part.variables[table.removesuffix(":0")] = variable.name
        axis = _integers(f"{op.name}/axis", 0, part)
        node.op = "GatherV2"
        for attribute in [a for a in node.attr if a != "batch_dims"]:
            del node.attr[attribute]
        node.attr["Tparams"].type = dtype.as_datatype_enum
        node.attr["Tindices"].type = op.inputs[1].dtype.as_datatype_enum
        node.attr["Taxis"].type = tf.int32.as_datatype_enum
        return table, axis


def _sizes(op: Any, x: str, part: _Nodes) -> str:
    """The name of the sizes that an op makes of `x` in the part: the samples are those of `x`, the rest is known."""
    integers, name = tf.int32.as_datatype_enum, f"{op.name}/sizes"
    samples = [f"{name}/shape", _integers(f"{name}/begin", [0], part), _integers(f"{name}/size", [1], part)]
    known = _integers(f"{name}/known", op.outputs[0].shape.as_list()[1:], part)
    axis = _integers(f"{name}/axis", 0, part)
    for kind, end, inputs, types in (
        ("Shape", "/shape", [x], {"T": tf.float32.as_datatype_enum, "out_type": integers}),
        ("Slice", "/samples", samples, {"T": integers, "Index": integers}),
        ("ConcatV2", "", [f"{name}/samples", known, axis], {"T": integers, "Tidx": integers}),
    ):
        node = node_def_pb2.NodeDef(name=f"{name}{end}", op=kind, input=inputs)
        for attribute, value in types.items():
            node.attr[attribute].type = value
        part.nodes[node.name] = node
    part.nodes[name].attr["N"].i = 2
    return name


def _integers(name: str, value: Any, part: _Nodes) -> str:
    """The name of an integer constant in the part."""
    node = node_def_pb2.NodeDef(name=name, op="Const")
    node.attr["dtype"].type = tf.int32.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, tf.int32))
    part.nodes[name] = node
    return f"{name}:0"


def _placeholder(name: str) -> str:
    """The name of the placeholder that stands for a tensor or a variable."""
    return f"fed/{name.replace(':', '_output_')}"
