"""Artifacts on disk: read as bytes, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from kquant.core.errors import ArtifactError, ExportError


def _spelled(path: Any, where: str, error: type[ArtifactError] | type[ExportError]) -> str:
    """A path as text, whatever kind of path was given."""
    try:
        return os.fsdecode(path)
    except TypeError as e:
        raise error(where, "a path is expected", type(path).__name__) from e


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an artifact's file.

    Raises:
        ArtifactError: there is no such file, it is a folder, or it may not be read.
    """
    where = f"artifact {_spelled(path, 'artifact', ArtifactError)!r}"
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as e:  # ValueError: a null character in the path
        raise ArtifactError(where, "it must be a readable file", e, "Give the path of an exported file") from e


def save(data: bytes, path: str | os.PathLike[str]) -> None:
    """Write a file whole or not at all: into a temporary file beside it, which then takes its name.

    Raises:
        ExportError: the folder is missing or not writable, the path is a directory or a device, the disk is full.
    """
    path = Path(_spelled(path, "path", ExportError))
    temporary = None
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory")
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is a device or a pipe, which a file must not replace")
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp makes private files; give this one the rights an ordinary new file gets
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as e:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if not isinstance(e, (OSError, ValueError)):  # ValueError: a null character in the path
            raise
        fix = "Give the path of a file in an existing folder that you may write to"
        raise ExportError(f"file {str(path)!r}", "it could not be written", e, fix) from e
