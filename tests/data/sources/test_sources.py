"""Sources by name, split expressions, joined sources."""

import itertools
import subprocess
import sys

import pytest

from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources.base import (
  DatasetInfo,
  Source,
  check_same_classes,
  join_sources,
  select_split,
)


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
def test_split_expressions(split, expected):
  assert labels(split, {"train": 200, "test": 7}) == list(expected)


def test_percentages_partition_split():
  parts = [labels(f"train[{p}%:{p + 10}%]", {"train": 57}) for p in range(0, 100, 10)]
  assert list(itertools.chain(*parts)) == list(range(57))


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ("trian", "split 'trian'.*'train'"),
    ("train[:5", "malformed split"),
    ("train[5:5]", "has no example"),
  ],
)
def test_invalid_split_raises(split, message):
  with pytest.raises(ValueError, match=message) as error:
    labels(split, {"train": 10})
  assert "numbers" in str(error.value)
  assert "\n" not in str(error.value)


def test_index_out_of_range_raises():
  source = select_split({"train": lambda: Numbers(5)}, "train[2:4]", "numbers")
  with pytest.raises(IndexError, match="2 examples"):
    source[2]
  assert source.example_name(1) == "number 3"


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("dmeo:digits", {}, "'dmeo'.*'demo'"),
    ("demo:digit", {}, "demo 'digit'.*'digits'"),
    ("demo", {}, "has no location"),
    ("../photos", {}, r"folder:\.\./photos\?"),
    ("tfds:x", {"datadir": "/"}, "'datadir'.*'data_dir'"),
  ],
)
def test_invalid_name_raises(name, options, message):
  with pytest.raises(ValueError, match=message) as error:
    load_source(name, "train", **options)
  assert "\n" not in str(error.value)


def test_equal_or_unnamed_classes_accepted():
  named = DatasetInfo("a", 1, 2, ("ant", "bee"))
  for other in (DatasetInfo("b", 3, 2, ("ant", "bee")), DatasetInfo("b", 3, 5)):
    check_same_classes(named, other, "the evaluation 'test'")
    check_same_classes(other, named, "the evaluation 'test'")


@pytest.mark.parametrize(
  ("names", "difference"),
  [
    (("ant", "cow"), "label 1 .*'bee'.*'cow'"),
    (("bee", "ant"), "label 0 .*'ant'.*'bee'"),
    (("ant",), "label 1 .*'bee'.*no class"),
    (("ant", "bee", "cow"), "label 2 .*no class.*'cow'"),
  ],
)
def test_different_class_named_in_error(names, difference):
  train, other = DatasetInfo("a", 1, 2, ("ant", "bee")), DatasetInfo("b", 1, len(names), names)
  with pytest.raises(ValueError, match=f"the evaluation 'test'.*{difference}") as error:
    check_same_classes(train, other, "the evaluation 'test'")
  assert "\n" not in str(error.value)


def test_data_imports_neither_jax_nor_tensorflow():
  """Grain imports jax if it is installed, for its trees; this package's data code does not."""
  program = (
    "import sys, vit_jax_zoo.data.sources, vit_jax_zoo.data.transforms, vit_jax_zoo.data.prepare\n"
    "from vit_jax_zoo.data.sources import load_source; load_source('demo:digits', 'test')[0]\n"
    "found = [m for m in ('jax', 'flax', 'tensorflow', 'torch') if m in sys.modules]\n"
    "sys.exit(' '.join(found) or None)"
  )
  subprocess.run([sys.executable, "-c", program], check=True)


def test_same_classes_joined():
  digits = load_source("demo:digits", "train[:3]"), load_source("demo:digits", "test[:2]")
  joined = join_sources(digits)
  assert (len(joined), joined.info.class_names) == (5, digits[0].info.class_names)
  assert joined.info.name == "demo:digits train[:3] + demo:digits test[:2]"
  assert joined[3] == digits[1][0]
  assert joined.example_name(4) == digits[1].example_name(1)
  assert join_sources(digits[:1]) is digits[0]


def test_different_classes_not_joined():
  with pytest.raises(ValueError, match="demo:photos train"):
    join_sources([load_source("demo:digits", "train"), load_source("demo:photos", "train")])
