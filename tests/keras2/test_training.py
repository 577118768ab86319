"""The template `keras_templates/training.py` on this generation of Keras."""

from keras_templates.training import *  # noqa: F403
