import json

import pytest

from vit_jax_zoo.training import atomic_write


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
  path = tmp_path / "notes.txt"
  atomic_write.write(path, "old")
  with pytest.raises(TypeError):
    atomic_write.write_json(path, {"a": object()})
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_who_has_it_open_reads_the_old_file_to_its_end(tmp_path):
  path = tmp_path / "notes.txt"
  atomic_write.write(path, b"old " * 1000)
  with path.open() as reader:
    assert reader.read(4) == "old "
    atomic_write.write(path, "new")
    assert reader.read() == "old " * 999
  assert path.read_text() == "new"


def test_json_keeps_peoples_letters(tmp_path):
  atomic_write.write_json(str(tmp_path / "a.json"), {"names": ["Käfer"]})
  text = (tmp_path / "a.json").read_text(encoding="utf-8")
  assert "Käfer" in text
  assert json.loads(text) == {"names": ["Käfer"]}


def test_json_with_surrogates_is_utf8_and_read_back(tmp_path):
  atomic_write.write_json(tmp_path / "a.json", ["b\udce9.png"])
  assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == ["b\udce9.png"]
