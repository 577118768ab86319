"""The template `keras_templates/masks.py` on this generation of Keras."""

from keras_templates.masks import *  # noqa: F403
