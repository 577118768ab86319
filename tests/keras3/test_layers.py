"""The template `keras_templates/layers.py` on this generation of Keras."""

from keras_templates.layers import *  # noqa: F403
