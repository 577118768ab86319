"""The template `keras_templates/edges.py` on this generation of Keras."""

from keras_templates.edges import *  # noqa: F403
