"""The template `keras_templates/controls.py` on this generation of Keras."""

from keras_templates.controls import *  # noqa: F403
