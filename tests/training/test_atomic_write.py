import json

import pytest

from vit_jax_zoo.training import atomic_write


def test_failed_write_keeps_old_file(tmp_path):
  path = tmp_path / "notes.txt"
  atomic_write.write(path, "old")
  with pytest.raises(TypeError):
    atomic_write.write_json(path, {"a": object()})
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_open_reader_keeps_old_file(tmp_path):
  path = tmp_path / "notes.txt"
  atomic_write.write(path, b"old " * 1000)
  with path.open() as reader:
    assert reader.read(4) == "old "
    atomic_write.write(path, "new")
    assert reader.read() == "old " * 999
  assert path.read_text() == "new"


def test_json_not_ascii_escaped(tmp_path):
  atomic_write.write_json(str(tmp_path / "a.json"), {"names": ["Käfer"]})
  text = (tmp_path / "a.json").read_text(encoding="utf-8")
  assert "Käfer" in text
  assert json.loads(text) == {"names": ["Käfer"]}


def test_json_surrogates_round_trip(tmp_path):
  atomic_write.write_json(tmp_path / "a.json", ["b\udce9.png"])
  assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == ["b\udce9.png"]
