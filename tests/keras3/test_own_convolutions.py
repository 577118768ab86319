"""The template `keras_templates/own_convolutions.py` on this generation of Keras."""

from keras_templates.own_convolutions import *  # noqa: F403
