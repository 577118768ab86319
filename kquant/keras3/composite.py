"""Composite layers as small functional models."""
def expand(layer, shapes, node):
    return f"the layer class {type(layer).__name__} has no integer form"
def expand_here(r, layer, inputs, node): raise 0
