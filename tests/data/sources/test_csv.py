"""Tables of image files: labels, splits, errors with file and row, training."""

import os

import numpy as np
import pytest

from tests.data.images import encode, photo
from vit_jax_zoo.data.pipeline import train_batches
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms import build_transforms


def write(file, *lines, encoding="utf-8"):
  """Writes a table and the images of its first column."""
  file.write_text("\n".join(lines) + "\n", encoding=encoding)
  for i, line in enumerate(lines[1:]):
    image = file.parent / line.replace(";", ",").split(",")[0]
    image.write_bytes(encode(photo(20, 24, seed=i)))
  return file


def test_splits_equal_those_of_folders(class_folders):
  files = sorted(file.relative_to(class_folders) for file in class_folders.rglob("*.jpg"))
  table = class_folders / "labels.csv"
  table.write_text("\n".join(["path,label", *(f"{file},{file.parent}" for file in files)]))
  for split in ("train", "test", "fit", "choose", "val"):
    ours = load_source(f"csv:{table}", split)
    theirs = load_source(f"folder:{class_folders}", split)
    assert ours.info.class_names == ("ant", "bee", "cow")
    np.testing.assert_array_equal(ours.labels(), theirs.labels())
    assert ours[0] == theirs[0]
    assert ours.example_name(0).startswith(f"{theirs.example_name(0)} ({table}, row ")


def test_decomposed_accents_found(tmp_path):
  write(tmp_path / "labels.csv", "path,label", "e\u0301.jpg,x", "b.jpg,y")
  (tmp_path / "labels.csv").write_text("path,label\n\u00e9.jpg,x\nb.jpg,y\n", encoding="utf-8")
  source = load_source(f"csv:{tmp_path / 'labels.csv'}", "all")
  assert source.missing() == []
  assert all(source[i]["image"] for i in range(2))


@pytest.mark.parametrize(
  ("lines", "class_names"),
  [
    (("path;label", "a.jpg;bee", "b.jpg;ant|bee ", "c.jpg;"), ("ant", "bee")),
    (("path,bee,ant", "a.jpg,1,0", "b.jpg,1,1", "c.jpg,0,0"), ("bee", "ant")),
    (("path,label", "a.jpg,0", "b.jpg,1|0", "c.jpg,"), ()),
  ],
)
def test_several_labels(lines, class_names, tmp_path):
  table = write(tmp_path / "labels.csv", *lines, encoding="utf-8-sig")
  source = load_source(f"csv:{table}", "all")
  assert (source.info.class_names, source.info.num_classes) == (class_names, 2)
  named = class_names or ("bee", "ant")
  labels = {
    os.path.basename(source.example_name(i).split(" (")[0]): {named[k] for k in source[i]["label"]}
    for i in range(3)
  }
  assert labels == {"a.jpg": {"bee"}, "b.jpg": {"ant", "bee"}, "c.jpg": set()}


def test_multi_hot_batches(tmp_path):
  lines = ("path,label", "a.jpg,x", "b.jpg,x|y", "c.jpg,", "d.jpg,y")
  source = load_source(f"csv:{write(tmp_path / 'labels.csv', *lines)}", "all")
  resize = [dict(name="resize", size=8)]
  transforms = build_transforms([*resize, dict(name="multi_hot")])
  with train_batches(source, transforms, batch_size=4, seed=0) as batches:
    labels = next(batches)["label"]
  assert sorted(map(tuple, labels)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
  with pytest.raises(ValueError, match=r"'label' .*multi_label=true"):
    next(train_batches(source, build_transforms(resize), batch_size=4, seed=0))


def test_named_splits(tmp_path):
  write(tmp_path / "train.csv", "path,label", "a.jpg,2", "b.jpg,0")
  write(tmp_path / "val_set.csv", "path,label", "c.jpg,1")
  train, test = (load_source(f"csv:{tmp_path}", split) for split in ("train", "test"))
  assert sorted(train.labels()) == [0, 2]
  assert (test.labels(), test.info.num_classes) == ([1], 3)
  lines = ("path,label,split", "a.jpg,x,train", "b.jpg,y,training", "c.jpg,x,test")
  table = write(tmp_path / "labels.csv", *lines)
  assert [len(load_source(f"csv:{table}", split)) for split in ("train", "test")] == [2, 1]


def test_other_columns_and_tab_separated_tables(tmp_path):
  lines = ("file\tbreed\tpath\tlabel", "a.jpg\tpug\tx\t1", "b.jpg\tcorgi\tx\t1")
  for split in ("train", "test"):
    (tmp_path / f"{split}.tsv").write_text("\n".join(lines))
  keys = {"image_key": "file", "label_key": "breed"}
  source = load_source(f"csv:{tmp_path}", "train", **keys)
  assert source.info.class_names == ("corgi", "pug")
  names = [os.path.basename(source.example_name(i).split(" (")[0]) for i in range(2)]
  assert dict(zip(names, source.labels(), strict=True)) == {"a.jpg": 1, "b.jpg": 0}
  (tmp_path / "train.tsv").write_text("file\tcat\tdog\na.jpg\t1\t0\nb.jpg\t1\t1\n")
  several = load_source(f"csv:{tmp_path / 'train.tsv'}", "all", image_key="file")
  for name in "ab":
    (tmp_path / f"{name}.jpg").write_bytes(b"")
  assert sorted(several[i]["label"].tolist() for i in range(2)) == [[0], [0, 1]]
  for wrong in ({"label_key": "species"}, {"image_key": "fil"}):
    with pytest.raises(ValueError, match=r"train\.tsv: the header is file,cat,dog; .*image_key"):
      load_source(f"csv:{tmp_path / 'train.tsv'}", "all", **(keys | wrong))


def test_class_names_option(tmp_path):
  table = write(tmp_path / "labels.csv", "path,label", "a.jpg,dog", "b.jpg,cat")
  source = load_source(f"csv:{table}", "all", class_names=("dog", "cat", "cow"))
  assert source.info.num_classes == 3
  assert sorted(source.labels()) == [0, 1]
  with pytest.raises(ValueError, match=r"row 3: label: 'cat' .*did you mean 'Cat'"):
    load_source(f"csv:{table}", "all", class_names=("dog", "Cat"))


def test_spaces_around_column_names(tmp_path):
  (tmp_path / "labels.csv").write_text(" path , label\na.jpg , cat\nb.jpg,dog\n")
  for name in "ab":
    (tmp_path / f"{name}.jpg").write_bytes(b"")
  assert load_source(f"csv:{tmp_path / 'labels.csv'}", "all").info.class_names == ("cat", "dog")


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    (("path,labels", "a.jpg,x"), "labels.csv, row 2: labels: 'x'; expected 0 or 1"),
    (("file,label", "a.jpg,x"), "labels.csv: the header is file,label"),
    (("path,label", "a.jpg,x", "b.jpg,"), "labels.csv, row 3: label: empty"),
    (("path,label", ",x"), "labels.csv, row 2: path: empty"),
    (("path,label", "a.jpg,x,y"), "labels.csv, row 2: not as many fields"),
    (("path,label", "a.jpg,x", "a.jpg,y"), "labels.csv, row 3: path: a.jpg .*row 2"),
    (("path,label", "a.jpg,7", "b.jpg,1000000000"), "row 3: label: 1000000000: no class"),
    (("path,label", "a.jpg,x", "./a.jpg,y"), "labels.csv, row 3: path: a.jpg .*row 2"),
    (("path,label", "a.jpg,-1", "b.jpg,1"), "labels.csv, row 2: label: -1: no class"),
    (("path, label", "a.jpg, Cat", "b.jpg, cat"), "labels.csv, row 3: label: 'cat'.*'Cat'"),
    (("path,label,split", "a.jpg,x,fold1"), "unknown split 'train'.*fold1"),
    (("path,label",), "no rows"),
    (("path,label", 'a.jpg,"x'), "labels.csv: not a table"),
  ],
)
def test_wrong_table_raises(lines, message, tmp_path):
  (tmp_path / "labels.csv").write_text("\n".join(lines))
  with pytest.raises(ValueError, match=message) as error:
    load_source(f"csv:{tmp_path / 'labels.csv'}", "train")
  assert "\n" not in str(error.value)


def test_missing_files(tmp_path):
  table = write(tmp_path / "labels.csv", "path,label", "a.jpg,x", "b.jpg,y")
  (tmp_path / "b.jpg").unlink()
  source = load_source(f"csv:{table}", "all")
  assert [os.path.basename(source.example_name(i)) for i in source.missing()] == [
    "labels.csv, row 3)"
  ]
  with pytest.raises(FileNotFoundError, match=r"b\.jpg .*row 3"):
    train_batches(source, (), batch_size=1, seed=0)
  with pytest.raises(FileNotFoundError, match=r"csv:.*no table"):
    load_source(f"csv:{tmp_path / 'absent.csv'}", "train")
