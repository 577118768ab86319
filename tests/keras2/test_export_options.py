"""The template `keras_templates/export_options.py` on this generation of Keras."""

from keras_templates.export_options import *  # noqa: F403
