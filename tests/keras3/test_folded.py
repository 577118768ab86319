"""The template `keras_templates/folded.py` on this generation of Keras."""

from keras_templates.folded import *  # noqa: F403
