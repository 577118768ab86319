"""A file is written whole or not at all."""

import os

import pytest

from kquant.core.errors import ExportError
from kquant.core.files import save


def test_save_writes_whole_with_ordinary_rights(tmp_path):
    path = tmp_path / "model.tflite"
    save(b"one", path)
    save(b"two", path)
    (tmp_path / "ordinary").write_bytes(b"")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_save_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "model.tflite"
    save(b"old", path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match="No space left"):
        save(b"new", path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.tflite"]


@pytest.mark.parametrize("name", ["missing/model.tflite", ".", "file/model.tflite"])
def test_save_refuses_a_path_it_cannot_write(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match="existing folder"):
        save(b"data", tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]
