"""Class counts and warnings of class imbalance that a new run logs."""

import numpy as np

from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.trainer import count_classes, describe_balance, find_imbalance

NAMES = ("ant", "bee", "cow")


def counts(*train, **others):
  return {name: np.array(values) for name, values in {"train": train, **others}.items()}


def test_describe_balance_every_split():
  assert describe_balance(counts(3, 0, 5, test=(1, 1, 0)), NAMES) == [
    "train: 8 examples of 3 classes: ant 3, bee 0, cow 5",
    "test: 2 examples of 3 classes: ant 1, bee 1, cow 0",
  ]


def test_describe_balance_many_classes_shortened():
  (line,) = describe_balance({"train": np.arange(40)[::-1]}, ())
  assert line == (
    "train: 780 examples of 40 classes: class 39 0, class 38 1, class 37 2, ..., class 2 37, "
    "class 1 38, class 0 39"
  )


def test_find_imbalance():
  (empty,) = find_imbalance(counts(3, 0, 5), NAMES)
  assert empty == "classes without training images (1): bee"
  (empty,) = find_imbalance(counts(0, 0, 5), NAMES)
  assert empty == "classes without training images (2): ant, bee"
  (alone,) = find_imbalance(counts(5), NAMES[:1])
  assert "one class found (ant)" in alone
  (uneven,) = find_imbalance(counts(30, 3, 5), NAMES)
  assert uneven.startswith("class imbalance: ant has 30 training images, bee 3; ")
  assert find_imbalance(counts(29, 3, 5), NAMES) == []
  assert find_imbalance({}, NAMES) == []


def test_count_classes_without_reading_images(tmp_path):
  for path in ("ant/1.png", "ant/2.png", "bee/3.png"):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes(b"never read")
  sources = {"train": load_source(f"folder:{tmp_path}", "all")}
  found = count_classes(sources)
  np.testing.assert_array_equal(found["train"], [2, 1])
