import json
import pickle
import re
import sys

import pytest

from vit_jax_zoo.data import prepare
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources.tfds import TFRecordFiles


def contents(source):
  return [(source[i]["image"], source[i]["label"]) for i in range(len(source))]


class TestTFRecord:
  @pytest.mark.parametrize("split", ["train", "test", "train[3:7]"])
  def test_tfrecord_equals_array_record(self, prepared, prepared_as_tfrecord, split):
    one, other = (
      load_source("tfds:tiny", split, data_dir=str(d)) for d in (prepared, prepared_as_tfrecord)
    )
    assert contents(one) == contents(other)
    assert one.info == other.info

  def test_pickle_round_trip(self, prepared_as_tfrecord):
    source = load_source("tfds:tiny", "train", data_dir=str(prepared_as_tfrecord))
    first = source[0]["image"]
    assert pickle.loads(pickle.dumps(source))[0]["image"] == first

  def test_several_files_any_order(self, tmp_path):
    for name, records in (("a", [b"one", b"", b"three"]), ("b", [b"four"])):
      framed = (len(r).to_bytes(8, "little") + b"crc." + r + b"crc." for r in records)
      (tmp_path / name).write_bytes(b"".join(framed))
    files = TFRecordFiles([str(tmp_path / "a"), str(tmp_path / "b")], [3, 1], bytes.decode)
    assert [files[i] for i in (3, 1, 0, 2)] == ["four", "", "one", "three"]

  def test_truncated_file_raises(self, tmp_path):
    path = tmp_path / "short"
    path.write_bytes((3).to_bytes(8, "little") + b"crc." + b"one" + b"crc." + b"\5\0\0")
    with pytest.raises(ValueError, match=r"1 whole records, expected 2"):
      TFRecordFiles([str(path)], [2], bytes.decode)[0]


class TestConvert:
  def test_convert_equal_dataset(self, prepared, prepared_as_tfrecord, tmp_path, capsys):
    source = prepared_as_tfrecord / "tiny" / "1.2.0"
    prepare.main([f"--from_tfrecord={source}", f"--data_dir={tmp_path}"])
    assert "GiB" in capsys.readouterr().err
    info = json.loads((tmp_path / "tiny" / "1.2.0" / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    for split in ("train", "test"):
      new, old = (load_source("tfds:tiny", split, data_dir=str(d)) for d in (tmp_path, prepared))
      assert contents(new) == contents(old)
    with pytest.raises(SystemExit, match=r"1\.2\.0: exists"):
      prepare.main([f"--from_tfrecord={source}", f"--data_dir={tmp_path}"])

  def test_argument_errors_escaped(self, capsys):
    with pytest.raises(SystemExit):
      prepare.main(["--from_tfrecord=a", "--dat\x1b[31ma\nerror: b"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --dat\\x1b[31ma error: b\n")

  def test_convert_resumes_after_interruption(self, prepared_as_tfrecord, tmp_path, monkeypatch):
    source = prepared_as_tfrecord / "tiny" / "1.2.0"
    converted = []
    convert = prepare._convert_shard

    def interrupt_second(shard, length, new):
      if len(converted) == 1:
        raise KeyboardInterrupt
      converted.append(shard)
      convert(shard, length, new)

    monkeypatch.setattr(prepare, "_convert_shard", interrupt_second)
    with pytest.raises(KeyboardInterrupt):
      prepare.convert_tfrecord(str(source), tmp_path)
    assert not (tmp_path / "tiny" / "1.2.0").exists()
    again = []
    monkeypatch.setattr(
      prepare, "_convert_shard", lambda shard, *rest: (again.append(shard), convert(shard, *rest))
    )
    prepare.convert_tfrecord(str(source), tmp_path)
    assert len(again) == 1
    assert again != converted
    assert len(load_source("tfds:tiny", "train", data_dir=str(tmp_path))) == 20

  def test_missing_records_raise(self, prepared_as_tfrecord, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (prepared_as_tfrecord / "tiny" / "1.2.0").iterdir():
      data = file.read_bytes()
      (broken / file.name).write_bytes(b"" if "test.tfrecord" in file.name else data)
    with pytest.raises(ValueError, match=r"test\.tfrecord.* has 0 whole records, expected 6"):
      prepare.convert_tfrecord(str(broken), tmp_path)

  def test_not_tfrecord_exits(self, prepared, tmp_path):
    with pytest.raises(SystemExit, match="array_record"):
      prepare.main([f"--from_tfrecord={prepared}/tiny/1.2.0", f"--data_dir={tmp_path}"])


class TestFolder:
  def test_folder_same_examples_and_order(self, class_folders, tmp_path):
    prepare.main([f"--from_folder={class_folders}", "--dataset=zoo", f"--data_dir={tmp_path}"])
    for split in ("train", "test"):
      packed = load_source("tfds:zoo", split, data_dir=str(tmp_path))
      loose = load_source(f"folder:{class_folders}", split)
      assert contents(packed) == contents(loose)
      assert packed.info.class_names == ("ant", "bee", "cow")

  def test_invalid_dataset_name_exits(self, class_folders, tmp_path):
    with pytest.raises(SystemExit, match="cannot name a dataset"):
      prepare.main([f"--from_folder={class_folders}", "--dataset=My Zoo", f"--data_dir={tmp_path}"])


def test_control_characters_escaped(tmp_path):
  with pytest.raises(SystemExit, match=re.escape(r"\x1b[31mnone")):
    prepare.main([f"--from_tfrecord={tmp_path}/\x1b[31mnone", f"--data_dir={tmp_path}"])


def test_missing_tensorflow_exits(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "tensorflow", None)  # simulates a missing installation
  with pytest.raises(SystemExit) as stopped:
    prepare.main(["--dataset=imagenet2012", f"--data_dir={tmp_path}"])
  message = str(stopped.value)
  assert "pip install -e '.[prepare]'" in message
  assert "\n" not in message


def test_unknown_dataset_suggests_nearest(tmp_path):
  with pytest.raises(ValueError, match=r"--dataset=imagenet201 .*imagenet2012"):
    prepare.prepare_tfds("imagenet201", tmp_path)


def test_insufficient_disk_space_raises(tmp_path):
  with pytest.raises(ValueError, match=r"--data_dir=.*huge"):
    prepare._check_disk("huge", tmp_path, 2**60)


@pytest.mark.parametrize("flag", ["data_dir", "from_tfrecord", "from_folder"])
def test_remote_path_exits(flag, capsys):
  with pytest.raises(SystemExit):
    prepare.main(["--dataset=x", f"--{flag}=gs://bucket/x"])
  assert f"--{flag}=gs://bucket/x is not on a local disk" in capsys.readouterr().err


def test_missing_dataset_flag_exits(capsys):
  with pytest.raises(SystemExit):
    prepare.main([])
  assert "--dataset=imagenet2012" in capsys.readouterr().err
