"""Class folders: splits by name or by hash, and validation of the layout."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from absl import logging

from tests.data.images import encode, photo
from vit_jax_zoo.data.images import suffixes
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources.folder import read_class_names


def test_hash_split(class_folders):
  parts = {s: load_source(f"folder:{class_folders}", s) for s in ("train", "test", "all")}
  names = {k: [s.example_name(i) for i in range(len(s))] for k, s in parts.items()}
  assert len(names["all"]) == 60
  assert sorted(names["train"] + names["test"]) == sorted(names["all"])
  assert 1 <= len(names["test"]) <= 12
  assert parts["all"].info.class_names == ("ant", "bee", "cow")
  for i in range(60):
    folder = os.path.basename(os.path.dirname(names["all"][i]))
    assert parts["all"].info.class_names[parts["all"][i]["label"]] == folder
  assert {parts["all"][i]["label"] for i in range(10)} == {0, 1, 2}  # classes are shuffled


def test_hash_split_stable_when_files_added(class_folders, tmp_path):
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


def test_ignored_files_logged(class_folders, caplog):
  logging.set_verbosity(logging.INFO)
  with caplog.at_level("INFO", logger="absl"):
    load_source(f"folder:{class_folders}", "train")
  assert "ignored 1 files that are not images: cow/notes.txt" in caplog.text


def test_fit_choose_partition_train(class_folders):
  def members(split):
    source = load_source(f"folder:{class_folders}", split)
    assert len(source) == source.info.num_examples
    return [source.example_name(i) for i in range(len(source))]

  assert sorted(members("fit") + members("choose")) == sorted(members("train"))
  assert 1 <= len(members("choose")) <= 12
  kept = members("choose")
  for i in range(20):
    (class_folders / "ant" / f"new{i}.jpg").write_bytes(b"")
  assert [name for name in members("choose") if "new" not in name] == kept


def test_few_files_one_held_out(class_folders):
  for file in sorted(class_folders.rglob("*.jpg"))[4:]:
    file.unlink()
  sizes = {s: len(load_source(f"folder:{class_folders}", s)) for s in ("fit", "choose", "test")}
  assert sizes == {"fit": 2, "choose": 1, "test": 1}


def test_choose_is_validation_folder(tmp_path):
  for path in ("train/x/1.png", "train/y/2.png", "val/y/3.png", "test/x/4.png"):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(b"")
  fit, choose = (load_source(f"folder:{tmp_path}", split) for split in ("fit", "choose"))
  assert len(fit) == 2
  assert choose.example_name(0).endswith("val/y/3.png")


def test_labels_without_decoding(class_folders):
  source = load_source(f"folder:{class_folders}", "train[3:]+test")
  np.testing.assert_array_equal(source.labels(), [source[i]["label"] for i in range(len(source))])
  assert load_source("demo:digits", "train").labels() is None


def test_split_folders(tmp_path):
  for path in ("train/x/1.png", "train/y/2.png", "val/y/3.png"):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(encode(photo(8, 8), "PNG"))
  train, val = (load_source(f"folder:{tmp_path}", split) for split in ("train", "val"))
  assert (len(train), len(val)) == (2, 1)
  assert val[0]["label"] == 1
  assert val.example_name(0) == str(tmp_path / "val" / "y" / "3.png")


@pytest.mark.parametrize(
  ("folders", "expected"),
  [
    (("train", "val"), dict.fromkeys(("test", "val", "valid", "validation"), "val")),
    (("train", "validation"), dict.fromkeys(("test", "valid", "validation"), "validation")),
    (("train", "valid"), dict.fromkeys(("test", "val", "validation"), "valid")),
    (("train", "test"), dict.fromkeys(("test", "val", "validation"), "test")),
    (("train", "valid", "test"), {"test": "test", "val": "valid", "validation": "valid"}),
  ],
)
def test_held_out_split_aliases(folders, expected, tmp_path):
  for name in folders:
    (tmp_path / name / "x").mkdir(parents=True)
    (tmp_path / name / "x" / "1.png").write_bytes(encode(photo(8, 8), "PNG"))
  for split, folder in expected.items():
    source = load_source(f"folder:{tmp_path}", split)
    assert source.example_name(0) == str(tmp_path / folder / "x" / "1.png")


def test_hash_test_split_is_validation(class_folders):
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
def test_ambiguous_held_out_split_raises(folders, split, known, tmp_path):
  for name in folders:
    (tmp_path / name / "x").mkdir(parents=True)
    (tmp_path / name / "x" / "1.png").write_bytes(encode(photo(8, 8), "PNG"))
  with pytest.raises(ValueError, match=f"split '{split}'.* choose, fit, {known}$"):
    load_source(f"folder:{tmp_path}", split)


@pytest.mark.parametrize("split", ["test", "val", "validation[:50%]"])
def test_missing_held_out_split_raises(split, tmp_path):
  (tmp_path / "train" / "x").mkdir(parents=True)
  (tmp_path / "train" / "x" / "1.png").write_bytes(encode(photo(8, 8), "PNG"))
  assert len(load_source(f"folder:{tmp_path}", "train")) == 1
  with pytest.raises(ValueError, match=r"test/ or val/.*folder:.*/train"):
    load_source(f"folder:{tmp_path}", split)


def test_too_few_images_for_choose_raises(tmp_path):
  for name in ("x", "y"):  # one of the two images is the test set
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.png").write_bytes(encode(photo(8, 8), "PNG"))
  for split in ("fit", "choose"):
    with pytest.raises(ValueError, match="1 training image"):
      load_source(f"folder:{tmp_path}", split)


def test_class_names_order(class_folders, tmp_path):
  (tmp_path / "names.txt").write_text("dog\ncow\nbee\nant\n")
  names = str(tmp_path / "names.txt")
  source = load_source(f"folder:{class_folders}", "all", class_names=names)
  assert source.info.num_classes == 4
  assert {source[i]["label"] for i in range(60)} == {1, 2, 3}
  with pytest.raises(ValueError, match="cow is not in class_names"):
    load_source(f"folder:{class_folders}", "all", class_names=["ant", "bee"])


def test_invalid_folder_raises(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"is no folder"):
    load_source(f"folder:{tmp_path}/none", "train")
  with pytest.raises(ValueError, match="no images"):
    load_source(f"folder:{tmp_path}", "train")
  with pytest.raises(ValueError, match="folder:gs://bucket/x"):
    load_source("folder:gs://bucket/x", "train")


def write(root, *paths):
  for path in paths:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(encode(photo(8, 8), "PNG"))


def members(root, split):
  source = load_source(f"folder:{root}", split)
  return sorted(os.path.relpath(source.example_name(i), root) for i in range(len(source)))


@pytest.mark.parametrize(
  ("train", "test"),
  [
    ("Train", "Test"),
    ("training", "testing"),
    ("TRAIN", "Validation"),
    ("training_set", "testset"),
    ("train", "dev"),
    ("train-set", "val-set"),
    ("train_images", "val_images"),
    ("train data", "test_data"),
    ("seg_train", "seg_test"),
    ("data_train", "data_test"),
    ("train2017", "val2017"),
    ("seg_train/seg_train", "seg_test/seg_test"),
    ("train/images", "test/images"),
  ],
)
def test_split_folder_spellings(train, test, tmp_path):
  write(tmp_path, f"{train}/x/1.png", f"{train}/y/2.png", f"{test}/y/3.png")
  assert members(tmp_path, "train") == [f"{train}/x/1.png", f"{train}/y/2.png"]
  assert members(tmp_path, "test") == [f"{test}/y/3.png"]
  assert load_source(f"folder:{tmp_path}", "test").info.class_names == ("x", "y")


def test_held_out_folder_without_train(tmp_path):
  write(tmp_path, "val/x/1.png", "test/y/2.png")
  assert members(tmp_path, "val") == ["val/x/1.png"]
  with pytest.raises(ValueError, match="unknown split 'train'"):
    load_source(f"folder:{tmp_path}", "train")


def test_split_folder_without_classes_raises(tmp_path):
  write(tmp_path, "train/1.png", "test/2.png")
  with pytest.raises(ValueError, match="<class>/<image>"):
    load_source(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize(
  "paths",
  [
    "fold1/x fold1/y fold2/x fold2/y",
    "fold1/x fold1/y fold1/z fold2/x fold2/y",
    "fold1/x fold1/y fold2/y",
    "train_256/x train_256/y val_256/x",
    "x/train x/test y/other",
    "x/train x/test x/docs y/other",
  ],
)
def test_nested_folders_raise(paths, tmp_path):
  write(tmp_path, *(f"{path}/{i}.png" for path in paths.split() for i in range(2)))
  with pytest.raises(ValueError, match="<class>/<image> or train"):
    load_source(f"folder:{tmp_path}", "train")
  names = sorted({path.split("/")[0] for path in paths.split()})
  assert len(load_source(f"folder:{tmp_path}", "all", class_names=names)) == 2 * len(paths.split())


@pytest.mark.parametrize(
  ("paths", "named"),
  [("train test/x test/y", "train"), ("train test docs", "docs"), ("val/x val/y docs", "docs")],
)
def test_incomplete_split_folders_raise(paths, named, tmp_path):
  write(tmp_path, *(f"{path}/{i}.png" for path in paths.split() for i in range(2)))
  with pytest.raises(ValueError, match=rf"{named}.*<class>/<image>"):
    load_source(f"folder:{tmp_path}", "test")


def test_dataset_folder_beside_others_raises(tmp_path):
  write(tmp_path, "dataset/x/1.png", "dataset/y/2.png", "docs/figure.png")
  with pytest.raises(ValueError, match=rf"folder:{tmp_path}/dataset\?"):
    load_source(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize(
  "paths", ["train/Cat test/cat", "Cat cat", "cat |cat", "hot dog|hot_dog", "train/x|val/x "]
)
def test_class_names_alike_raise(paths, tmp_path):
  folders = paths.split("|") if "|" in paths else paths.split(" ")
  write(tmp_path, *(f"{path}/{i}.png" for path in folders for i in range(2)))
  with pytest.raises(ValueError, match=rf"{tmp_path}: .*did you mean one class"):
    load_source(f"folder:{tmp_path}", "train")
  names = [path.split("/")[-1] for path in folders]
  source = load_source(f"folder:{tmp_path}", "train", class_names=names)
  assert source.info.class_names == tuple(names)


def test_label_maps_beside_images_raise(tmp_path):
  write(tmp_path, *(f"{name}/{i}.png" for name in ("images", "Masks") for i in range(2)))
  with pytest.raises(ValueError, match=rf"{tmp_path}: Masks/ .*segmentation:{tmp_path}"):
    load_source(f"folder:{tmp_path}", "train")
  assert len(load_source(f"folder:{tmp_path}", "all", class_names=("images", "Masks"))) == 4


def test_class_names_of_signs_read(tmp_path):
  names = ("-1", "1", "1-2", "12", "_1")
  write(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(2)))
  assert load_source(f"folder:{tmp_path}", "train").info.class_names == names


def test_class_names_in_other_case_suggested(tmp_path):
  write(tmp_path, "Cat/1.png", "dog/1.png")
  with pytest.raises(ValueError, match=r"Cat is not in class_names; did you mean 'cat'"):
    load_source(f"folder:{tmp_path}", "train", class_names=["cat", "dog"])


def test_subfolders_of_class_read(tmp_path):
  write(tmp_path, "x/images/1.png", "y/images/1.png", "x/2.png", "y/a/2.png", "y/b/3.png")
  assert load_source(f"folder:{tmp_path}", "all").info.class_names == ("x", "y")


def test_class_named_train(tmp_path):
  write(tmp_path, *(f"{name}/{i}.png" for name in ("bus", "car", "train") for i in range(3)))
  assert load_source(f"folder:{tmp_path}", "all").info.class_names == ("bus", "car", "train")


@pytest.mark.parametrize("inner", ["train/x", "x", "sub", "train/x/z"])
def test_enclosing_folder_suggested(inner, tmp_path):
  write(tmp_path, f"dataset/{inner}/1.png", "dataset/y/2.png")
  with pytest.raises(ValueError, match=rf"folder:{tmp_path}/dataset\?"):
    load_source(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize("files", [
  ("fold1/a/1.png", "fold1/b/1.png", "fold2/c/1.png", "fold2/d/1.png"),
  ("part_1/a/1.png", "part_1/b/1.png", "part_2/c/1.png"),
  ("train/fold1/a/1.png", "train/fold1/b/1.png", "train/fold2/c/1.png", "test/a/1.png"),
])  # fmt: skip
def test_numbered_parts_with_disjoint_classes_raise(files, tmp_path):
  write(tmp_path, *files)
  with pytest.raises(ValueError, match=r"(fold1, fold2|part_1, part_2) contain a, b"):
    load_source(f"folder:{tmp_path}", "train")


def test_folders_inside_of_classes_belong_to_them(tmp_path):
  write(tmp_path, "cats/siamese/1.png", "cats/persian/1.png", "dogs/poodle/1.png", "dogs/1.png")
  assert load_source(f"folder:{tmp_path}", "all").info.class_names == ("cats", "dogs")


@pytest.mark.parametrize("content", [b"caf\xe9\n", b'["a", '])
def test_damaged_class_names_file_raises(content, tmp_path):
  (tmp_path / "names.txt").write_bytes(content)
  with pytest.raises(ValueError, match=r"class_names: .*names\.txt"):
    read_class_names(str(tmp_path / "names.txt"))


def test_class_folders_unicode_normalised(tmp_path):
  for split, form in (("train", "NFC"), ("test", "NFD")):
    write(tmp_path, f"{split}/{unicodedata.normalize(form, 'é')}/1.png", f"{split}/x/1.png")
  assert load_source(f"folder:{tmp_path}", "test").info.class_names == ("x", "é")


def test_nested_dataset_suggested_extra_folder_logged(tmp_path, caplog):
  write(tmp_path, "a/b/train/x/1.png", "a/b/test/x/1.png", "a/b/extra/x/1.png")
  with pytest.raises(ValueError, match=rf"folder:{tmp_path}/a/b\?"):
    load_source(f"folder:{tmp_path}", "train")
  load_source(f"folder:{tmp_path}/a/b", "train")
  assert "split folders: extra" in caplog.text


def test_system_files_skipped(tmp_path, caplog):
  logging.set_verbosity(logging.INFO)
  write(tmp_path, *(f"{name}/{i}.png" for name in ("x", "y") for i in range(3)))
  write(tmp_path, "__MACOSX/x/._1.png", ".ipynb_checkpoints/1.png", "x/._1.png")
  write(tmp_path, "x/.ipynb_checkpoints/1-checkpoint.png", "@eaDir/1.png", "$RECYCLE.BIN/1.png")
  write(tmp_path, "lost+found/1.png", "System Volume Information/1.png", "x/__pycache__/1.png")
  (tmp_path / "empty").mkdir()
  os.mkfifo(tmp_path / "x" / "pipe.jpg")
  (tmp_path / "x" / "folder.jpg").mkdir()
  (tmp_path / "x" / "lost.png").symlink_to(tmp_path / "nowhere.png")
  with caplog.at_level("INFO", logger="absl"):
    source = load_source(f"folder:{tmp_path}", "all")
  assert source.info.class_names == ("x", "y")
  assert len(source) == 6
  assert "lost.png (dangling link)" in caplog.text
  assert "pipe.jpg (not a regular file)" in caplog.text
  assert "empty (no images" in caplog.text


def test_folder_links_followed_cycle_safe(tmp_path):
  write(tmp_path / "elsewhere", "1.png", "2.png")
  write(tmp_path / "root", "x/1.png", "x/2.png")
  (tmp_path / "root" / "y").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "root" / "x" / "again").symlink_to(tmp_path / "root" / "x")
  assert members(tmp_path / "root", "all") == ["x/1.png", "x/2.png", "y/1.png", "y/2.png"]


def test_hash_split_stratified(tmp_path):
  write(tmp_path, *(f"{i}/{j}.png" for i in range(12) for j in range(3)), "single/1.png")
  sources = {split: load_source(f"folder:{tmp_path}", split) for split in ("train", "test")}
  counts = {k: np.bincount(source.labels(), minlength=13) for k, source in sources.items()}
  assert counts["train"].min() >= 1
  assert counts["test"][:12].min() >= 1
  assert counts["test"][12] == 0


def test_pillow_suffixes_read(tmp_path):
  for i, suffix in enumerate(sorted(suffixes())):
    write(tmp_path, f"x/{i}{suffix}", f"y/{i}{suffix.upper()}")
  assert len(load_source(f"folder:{tmp_path}", "all")) == 2 * len(suffixes())
  assert suffixes() >= {".jpg", ".jfif", ".png", ".webp", ".avif", ".jp2", ".ppm", ".pgm", ".tiff"}


def test_recursive_links_skipped(tmp_path, caplog):
  write(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "test") for name in "xy"))
  for link, target in (("self.png", "self.png"), ("up", ".."), ("root", "../..")):
    (tmp_path / "train" / "x" / link).symlink_to(target)
  assert members(tmp_path, "train") == ["train/x/1.png", "train/y/1.png"]
  assert f"{tmp_path}/train/x/self.png: skipped" in caplog.text


def test_class_names_too_nested_raise(tmp_path):
  (tmp_path / "names.json").write_text("[" * 100_000)
  with pytest.raises(ValueError, match=r"names\.json"):
    read_class_names(str(tmp_path / "names.json"))


def test_non_utf8_class_folder_escaped(tmp_path):
  write(tmp_path, "b\udce9/1.png", "b\udce9/2.png", "x/1.png", "x/2.png")
  source = load_source(f"folder:{tmp_path}", "all")
  assert source.info.class_names == (r"b\udce9", "x")
  assert [source[i]["label"] for i in range(4)] == source.labels().tolist()
