"""tf_keras: these tests run in a process of their own."""

import keras_choice

keras_choice.choose("tf_keras")
