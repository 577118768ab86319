"""The TensorFlow 1 front end: `read` a graph, `attach` a plan to it in place."""

from kquant.tf1.attach import attach
from kquant.tf1.calibrated import as_float32, deliver, prepare, take_state
from kquant.tf1.controlled import controlled
from kquant.tf1.graphs import check, select
from kquant.tf1.read import read

__all__ = ["as_float32", "attach", "check", "controlled", "deliver", "prepare", "read", "select", "take_state"]
