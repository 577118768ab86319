"""The template `keras_templates/families.py` on this generation of Keras."""

from keras_templates.families import *  # noqa: F403
