"""The template `keras_templates/own_code.py` on this generation of Keras."""

from keras_templates.own_code import *  # noqa: F403
