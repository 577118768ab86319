"""Which generation of Keras this process tests. A folder's conftest says so before any template is imported."""

import os

VARIABLE = "KQUANT_TEST_KERAS"


def choose(name: str) -> None:
    """Let the templates of this process test `keras` or `tf_keras`."""
    chosen = os.environ.setdefault(VARIABLE, name)
    if chosen != name:
        raise RuntimeError(f"this process tests {chosen}; run the tests of {name} in one of their own")


def chosen() -> str:
    """The generation that was chosen."""
    return os.environ[VARIABLE]
