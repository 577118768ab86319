"""The template `keras_templates/bad_input.py` on this generation of Keras."""

from keras_templates.bad_input import *  # noqa: F403
