import itertools
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from absl import logging
from etils import epath

from tests.data.conftest import encode, photo
from vit_jax_zoo.data import demos, prepare, tfds_source
from vit_jax_zoo.data.base import (
  DatasetInfo,
  Source,
  check_same_classes,
  join_sources,
  select_split,
)
from vit_jax_zoo.data.images import decode_image
from vit_jax_zoo.data.sources import load_source


class Numbers(Source):
  def __init__(self, count, name="numbers"):
    self.info = DatasetInfo(name, count, 10)

  def __getitem__(self, index):
    return {"label": index}

  def example_name(self, index):
    return f"number {index}"


def labels(split, counts):
  splits = {name: lambda n=n: Numbers(n) for name, n in counts.items()}
  source = select_split(splits, split, "numbers")
  assert len(source) == source.info.num_examples
  return [source[i]["label"] for i in range(len(source))]


@pytest.mark.parametrize(
  ("split", "expected"),
  [
    ("train", range(200)),
    ("train[:3]", range(3)),
    ("train[197:]", range(197, 200)),
    ("train[-2:]", range(198, 200)),
    ("train[10:12]", (10, 11)),
    ("train[99%:]", (198, 199)),
    ("train[:1%]+test[4:]", (0, 1, 4, 5, 6)),
    ("minival", (198, 199)),
    ("minitrain", range(198)),
    ("test[:50%]", range(4)),
  ],
)
def test_splits(split, expected):
  assert labels(split, {"train": 200, "test": 7}) == list(expected)


def test_percentages_partition_a_split():
  parts = [labels(f"train[{p}%:{p + 10}%]", {"train": 57}) for p in range(0, 100, 10)]
  assert list(itertools.chain(*parts)) == list(range(57))


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ("trian", "unknown split 'trian'; did you mean 'train'"),
    ("train[:5", "cannot read the split"),
    ("train[5:5]", "holds no example"),
  ],
)
def test_wrong_splits_are_one_line(split, message):
  with pytest.raises(ValueError, match="numbers") as error:
    labels(split, {"train": 10})
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_index_out_of_range():
  source = select_split({"train": lambda: Numbers(5)}, "train[2:4]", "numbers")
  with pytest.raises(IndexError, match="2 examples"):
    source[2]
  assert source.example_name(1) == "number 3"


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("dmeo:digits", {}, "did you mean 'demo'"),
    ("demo:digit", {}, "unknown demo 'digit'; did you mean 'digits'"),
    ("demo", {}, "says nothing after its kind"),
    ("tfds:x", {"datadir": "/"}, "did you mean 'data_dir'"),
  ],
)
def test_wrong_names_are_one_line(name, options, message):
  with pytest.raises(ValueError, match=r"did you mean|says nothing") as error:
    load_source(name, "train", **options)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_equal_and_unnamed_classes_pass():
  named = DatasetInfo("a", 1, 2, ("ant", "bee"))
  for other in (DatasetInfo("b", 3, 2, ("ant", "bee")), DatasetInfo("b", 3, 5)):
    check_same_classes(named, other, "the evaluation 'test'")
    check_same_classes(other, named, "the evaluation 'test'")


@pytest.mark.parametrize(
  ("names", "difference"),
  [
    (("ant", "cow"), "label 1 is 'bee' in a (2 classes) and 'cow' in b (2 classes)"),
    (("bee", "ant"), "label 0 is 'ant' in a (2 classes) and 'bee' in b (2 classes)"),
    (("ant",), "label 1 is 'bee' in a (2 classes) and no class in b (1 classes)"),
    (("ant", "bee", "cow"), "label 2 is no class in a (2 classes) and 'cow' in b (3 classes)"),
  ],
)
def test_the_first_different_class_is_named(names, difference):
  train, other = DatasetInfo("a", 1, 2, ("ant", "bee")), DatasetInfo("b", 1, len(names), names)
  with pytest.raises(ValueError, match="the evaluation 'test' has other classes") as error:
    check_same_classes(train, other, "the evaluation 'test'")
  assert difference in str(error.value)
  assert "\n" not in str(error.value)


class TestDemos:
  def test_digits(self):
    train, test = (load_source("demo:digits", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.info.class_names == tuple("0123456789")
    counts = np.bincount([test[i]["label"] for i in range(360)])
    assert counts.min() >= 34  # stratified
    assert counts.max() <= 37

  def test_digits_are_scikit_learns(self):
    from sklearn.datasets import load_digits

    sources = [load_source("demo:digits", split) for split in ("train", "test")]
    examples = [source[i] for source in sources for i in range(len(source))]
    ours = sorted((e["label"], decode_image(e["image"])[..., 0].tobytes()) for e in examples)
    pixels, targets = load_digits(return_X_y=True)
    pixels = np.round(pixels * 255 / 16).astype(np.uint8)
    assert ours == sorted((int(t), p.tobytes()) for p, t in zip(pixels, targets, strict=True))

  def test_photos(self):
    train, test = (load_source("demo:photos", split) for split in ("train", "test"))
    assert train.info.num_classes == len(demos.PHOTOS) == 10
    assert {test[i]["label"] for i in range(len(test))} == set(range(10))
    assert decode_image(train[0]["image"]).shape == (64, 64, 3)
    assert 0.19 < len(test) / (len(test) + len(train)) < 0.21
    for name in demos.PHOTOS:
      assert demos.read_photo(name).std() > 20, name

  def test_many_processes_prepare_at_once(self, tmp_path):
    program = (
      "from vit_jax_zoo.data.sources import load_source; s = load_source('demo:digits', 'test'); "
      "print(sum(s[i]['label'] for i in range(len(s))))"
    )
    env = {**os.environ, "VIT_JAX_ZOO_CACHE": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", program]
    runs = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    said = {run.communicate()[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert len(said) == 1
    assert os.listdir(tmp_path / "demos" / "digits") == ["1.0.0"]

  def test_unwritable_cache(self, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIT_JAX_ZOO_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set VIT_JAX_ZOO_CACHE"):
      load_source("demo:digits", "train")


class TestFolder:
  def test_split_by_hash(self, class_folders):
    parts = {s: load_source(f"folder:{class_folders}", s) for s in ("train", "test", "all")}
    names = {k: [s.example_name(i) for i in range(len(s))] for k, s in parts.items()}
    assert len(names["all"]) == 60
    assert sorted(names["train"] + names["test"]) == sorted(names["all"])
    assert 1 <= len(names["test"]) <= 12
    assert parts["all"].info.class_names == ("ant", "bee", "cow")
    for i in range(60):
      folder = os.path.basename(os.path.dirname(names["all"][i]))
      assert parts["all"].info.class_names[parts["all"][i]["label"]] == folder
    assert {parts["all"][i]["label"] for i in range(10)} == {0, 1, 2}  # classes are mixed

  def test_split_does_not_change(self, class_folders, tmp_path):
    def members(root, split):
      source = load_source(f"folder:{root}", split)
      return [os.path.relpath(source.example_name(i), root) for i in range(len(source))]

    before = {split: members(class_folders, split) for split in ("train", "test")}
    assert before["test"][0] == "cow/26.jpg"  # on every machine
    moved = tmp_path / "moved"
    shutil.copytree(class_folders, moved)
    for i in range(20):
      (moved / "ant" / f"new{i}.jpg").write_bytes(b"")
    for split, files in before.items():
      assert [f for f in members(moved, split) if "new" not in f] == files

  def test_counts_what_it_ignores(self, class_folders, caplog):
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO"):
      load_source(f"folder:{class_folders}", "train")
    assert "files that are not images and were ignored (1): cow/notes.txt" in caplog.text

  def test_training_files_are_held_out_by_hash_to_choose_by(self, class_folders):
    def members(split):
      source = load_source(f"folder:{class_folders}", split)
      assert len(source) == source.info.num_examples
      return [source.example_name(i) for i in range(len(source))]

    assert members("fit") + members("choose") == members("train")
    assert 1 <= len(members("choose")) <= 12
    kept = members("choose")
    for i in range(20):
      (class_folders / "ant" / f"new{i}.jpg").write_bytes(b"")
    assert [name for name in members("choose") if "new" not in name] == kept

  def test_of_a_few_files_one_is_held_out(self, class_folders):
    for file in sorted(class_folders.rglob("*.jpg"))[4:]:
      file.unlink()
    sizes = {s: len(load_source(f"folder:{class_folders}", s)) for s in ("fit", "choose", "test")}
    assert sizes == {"fit": 2, "choose": 1, "test": 1}

  def test_a_validation_folder_is_what_to_choose_by(self, tmp_path):
    for path in ("train/x/1.png", "train/y/2.png", "val/y/3.png", "test/x/4.png"):
      (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / path).write_bytes(b"")
    fit, choose = (load_source(f"folder:{tmp_path}", split) for split in ("fit", "choose"))
    assert len(fit) == 2
    assert choose.example_name(0).endswith("val/y/3.png")

  def test_labels_are_known_without_reading(self, class_folders):
    source = load_source(f"folder:{class_folders}", "train[3:]+test")
    np.testing.assert_array_equal(source.labels(), [source[i]["label"] for i in range(len(source))])
    assert load_source("demo:digits", "train").labels() is None

  def test_given_split_folders(self, tmp_path):
    for path in ("train/x/1.png", "train/y/2.png", "val/y/3.png"):
      (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / path).write_bytes(encode(photo(8, 8), "PNG"))
    train, val = (load_source(f"folder:{tmp_path}", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    assert val[0]["label"] == 1
    assert val.example_name(0) == str(tmp_path / "val" / "y" / "3.png")

  @pytest.mark.parametrize(
    ("folders", "meant"),
    [
      (("train", "val"), dict.fromkeys(("test", "val", "valid", "validation"), "val")),
      (("train", "validation"), dict.fromkeys(("test", "valid", "validation"), "validation")),
      (("train", "valid"), dict.fromkeys(("test", "val", "validation"), "valid")),
      (("train", "test"), dict.fromkeys(("test", "val", "validation"), "test")),
      (("train", "valid", "test"), {"test": "test", "val": "valid", "validation": "valid"}),
    ],
  )
  def test_held_out_folders_go_by_each_others_names(self, folders, meant, tmp_path):
    for name in folders:
      (tmp_path / name / "x").mkdir(parents=True)
      (tmp_path / name / "x" / "1.png").write_bytes(encode(photo(8, 8), "PNG"))
    for split, folder in meant.items():
      source = load_source(f"folder:{tmp_path}", split)
      assert source.example_name(0) == str(tmp_path / folder / "x" / "1.png")

  def test_a_hashed_test_set_is_the_validation_set_too(self, class_folders):
    test, validation = (
      load_source(f"folder:{class_folders}", split) for split in ("test", "validation")
    )
    assert [test.example_name(i) for i in range(len(test))] == [
      validation.example_name(i) for i in range(len(validation))
    ]

  @pytest.mark.parametrize(
    ("folders", "split", "known"),
    [
      (("train", "val", "validation"), "test", "train, val, validation"),
      (("train", "val", "validation"), "valid", "train, val, validation"),
    ],
  )
  def test_a_held_out_set_that_is_not_clear(self, folders, split, known, tmp_path):
    for name in folders:
      (tmp_path / name / "x").mkdir(parents=True)
      (tmp_path / name / "x" / "1.png").write_bytes(encode(photo(8, 8), "PNG"))
    with pytest.raises(
      ValueError, match=f"unknown split '{split}'.*[Kk]nown: choose, fit, {known}$"
    ):
      load_source(f"folder:{tmp_path}", split)

  @pytest.mark.parametrize("split", ["test", "val", "validation[:50%]"])
  def test_nothing_is_held_out(self, split, tmp_path):
    (tmp_path / "train" / "x").mkdir(parents=True)
    (tmp_path / "train" / "x" / "1.png").write_bytes(encode(photo(8, 8), "PNG"))
    assert len(load_source(f"folder:{tmp_path}", "train")) == 1
    with pytest.raises(
      ValueError, match=r"none in test/ or val/; add one .* or give folder:.*/train"
    ):
      load_source(f"folder:{tmp_path}", split)

  def test_too_few_images_to_choose_by(self, tmp_path):
    for name in ("x", "y"):  # of two images, one is the test set
      (tmp_path / name).mkdir()
      (tmp_path / name / "1.png").write_bytes(encode(photo(8, 8), "PNG"))
    for split in ("fit", "choose"):
      with pytest.raises(ValueError, match="has 1 image to train on, and none to choose by; exp"):
        load_source(f"folder:{tmp_path}", split)

  def test_class_order_can_be_given(self, class_folders, tmp_path):
    (tmp_path / "names.txt").write_text("dog\ncow\nbee\nant\n")
    names = str(tmp_path / "names.txt")
    source = load_source(f"folder:{class_folders}", "all", class_names=names)
    assert source.info.num_classes == 4
    assert {source[i]["label"] for i in range(60)} == {1, 2, 3}
    with pytest.raises(ValueError, match="cow is not one of the 2 class_names"):
      load_source(f"folder:{class_folders}", "all", class_names=["ant", "bee"])

  def test_errors(self, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder; expected one folder for each"):
      load_source(f"folder:{tmp_path}/none", "train")
    with pytest.raises(ValueError, match="holds no images in class folders"):
      load_source(f"folder:{tmp_path}", "train")
    with pytest.raises(ValueError, match="folder:gs://bucket/x is not on a local disk; copy it"):
      load_source("folder:gs://bucket/x", "train")


@pytest.fixture
def bucket(monkeypatch):
  """Lets gs://bucket/data stand for a local folder; what was asked for is in the list."""

  def stand_in(folder):
    asked = []

    def path(location):
      asked.append(str(location))
      return epath.Path(str(location).replace("gs://bucket/data", str(folder)))

    monkeypatch.setattr(tfds_source, "epath", types.SimpleNamespace(Path=path))
    return asked

  return stand_in


class TestTfds:
  def test_by_name_version_and_path(self, prepared):
    sources = [
      load_source("tfds:tiny", "train", data_dir=str(prepared)),
      load_source("tfds:tiny:1.2.0", "train", data_dir=str(prepared)),
      load_source(f"tfds:{prepared}/tiny/1.2.0", "train"),
    ]
    for source in sources:
      assert len(source) == 20
      assert source.info.class_names == ("a", "b", "c", "d", "e")
      assert [source[i]["label"] for i in range(20)] == [sources[0][i]["label"] for i in range(20)]
      assert set(source[0]) == {"image", "label"}
      assert isinstance(source[0]["image"], bytes)
    assert sources[0].example_name(3) == "tfds:tiny train[3]"

  def test_environment_names_the_data_dir(self, prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(load_source("tfds:tiny", "test[:4]")) == 4

  def test_several_labels(self, prepared):
    source = load_source("tfds:tiny", "train", data_dir=str(prepared), label_key="labels")
    counts = sorted(len(source[i]["label"]) for i in range(20))
    assert counts == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert all(source[i]["label"].dtype == np.int32 for i in range(20))
    assert source.info.num_classes == 5

  def test_missing_dataset_says_how_to_get_it(self, prepared):
    with pytest.raises(FileNotFoundError) as error:
      load_source("tfds:imagenet2012", "train", data_dir=str(prepared))
    message = str(error.value)
    assert "\n" not in message
    command = "python -m vit_jax_zoo.data.prepare --dataset=imagenet2012 --data_dir="
    assert command + str(prepared) in message
    assert "demo:digits" in message

  def test_missing_version_lists_those_there(self, prepared):
    with pytest.raises(FileNotFoundError, match=r"there: 1\.2\.0"):
      load_source("tfds:tiny:9.9.9", "train", data_dir=str(prepared))

  def test_wrong_feature(self, prepared):
    with pytest.raises(ValueError, match="no feature 'lable'; it has file_name, image, label"):
      load_source("tfds:tiny", "train", data_dir=str(prepared), label_key="lable")

  def test_a_bucket_is_found_like_a_folder(self, prepared, bucket):
    asked = bucket(prepared)
    sources = [
      load_source("tfds:tiny", "train", data_dir="gs://bucket/data"),
      load_source("tfds:tiny:1.2.0", "train", data_dir="gs://bucket/data/"),
      load_source("tfds:gs://bucket/data/tiny/1.2.0", "train"),
    ]
    assert asked[0] == "gs://bucket/data"
    assert asked[-1] == "gs://bucket/data/tiny/1.2.0"
    assert all(len(source) == 20 and isinstance(source[0]["image"], bytes) for source in sources)

  def test_a_bucket_keeps_its_two_slashes(self):
    assert str(epath.Path("gs://bucket/data") / "tiny" / "1.2.0") == "gs://bucket/data/tiny/1.2.0"

  def test_tfrecord_files_in_a_bucket_are_one_line(self, prepared_as_tfrecord, monkeypatch):
    monkeypatch.setattr(tfds_source, "is_remote", lambda path: ".tfrecord" in path)
    with pytest.raises(ValueError, match="read by index from a local disk only") as error:
      load_source("tfds:tiny", "train", data_dir=str(prepared_as_tfrecord))
    assert "\n" not in str(error.value)

  def test_packed_folders_keep_validation_by_all_of_its_names(self, tmp_path):
    for path in ("train/x/1.png", "val/x/2.png"):
      (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / "images" / path).write_bytes(encode(photo(8, 8), "PNG"))
    prepare.prepare_folder(str(tmp_path / "images"), "packed", tmp_path)
    for split in ("val", "valid", "validation"):
      assert len(load_source("tfds:packed", split, data_dir=str(tmp_path))) == 1
    with pytest.raises(ValueError, match="unknown split 'test'"):
      load_source("tfds:packed", "test", data_dir=str(tmp_path))

  def test_path_that_is_no_dataset(self, prepared):
    with pytest.raises(FileNotFoundError, match="give the innermost folder"):
      load_source(f"tfds:{prepared}/tiny", "train")


def test_sources_and_transforms_load_neither_jax_nor_tensorflow():
  """Grain imports jax where it is installed, for its trees; nothing of ours does."""
  program = (
    "import sys, vit_jax_zoo.data.sources, vit_jax_zoo.data.transforms, vit_jax_zoo.data.prepare\n"
    "from vit_jax_zoo.data.sources import load_source; load_source('demo:digits', 'test')[0]\n"
    "found = [m for m in ('jax', 'flax', 'tensorflow', 'torch') if m in sys.modules]\n"
    "sys.exit(' '.join(found) or None)"
  )
  subprocess.run([sys.executable, "-c", program], check=True)


def test_sources_of_the_same_classes_are_joined():
  digits = load_source("demo:digits", "train[:3]"), load_source("demo:digits", "test[:2]")
  joined = join_sources(digits)
  assert (len(joined), joined.info.class_names) == (5, digits[0].info.class_names)
  assert joined.info.name == "demo:digits train[:3] + demo:digits test[:2]"
  assert joined[3] == digits[1][0]
  assert joined.example_name(4) == digits[1].example_name(1)
  assert join_sources(digits[:1]) is digits[0]


def test_sources_of_other_classes_are_not_joined():
  with pytest.raises(ValueError, match=r"demo:photos train, mixed in, has other classes than"):
    join_sources([load_source("demo:digits", "train"), load_source("demo:photos", "train")])
