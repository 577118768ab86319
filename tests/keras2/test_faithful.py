"""The template `keras_templates/faithful.py` on this generation of Keras."""

from keras_templates.faithful import *  # noqa: F403
