"""The template `keras_templates/composed.py` on this generation of Keras."""

from keras_templates.composed import *  # noqa: F403
