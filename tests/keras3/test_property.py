"""The template `keras_templates/property.py` on this generation of Keras."""

from keras_templates.property import *  # noqa: F403
