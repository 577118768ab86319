"""The template `keras_templates/distributed.py` on this generation of Keras."""

from keras_templates.distributed import *  # noqa: F403
