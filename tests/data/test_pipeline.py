import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.data.images import encode, photo
from vit_jax_zoo.data.pipeline import eval_batches, train_batches
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources.base import CorruptExampleError, DatasetInfo, Source
from vit_jax_zoo.data.transforms import build_transforms

RANDOM = build_transforms(
  [dict(name="random_resized_crop", size=16), dict(name="random_flip"), dict(name="decode")]
)
PLAIN = build_transforms([dict(name="resize", size=8)])


class Images(Source):
  """`count` PNGs whose label is their index; those in `corrupt` are truncated."""

  def __init__(self, count, corrupt=(), num_classes=1000, labels=None):
    self.info = DatasetInfo("images", count, num_classes)
    self._data = [encode(photo(20, 24, seed=i), "PNG") for i in range(min(count, 8))]
    self._corrupt = frozenset(corrupt)
    self._labels = labels

  def __getitem__(self, index):
    data = self._data[index % 8]
    image = data[:50] if index in self._corrupt else data
    return {"image": image, "label": self._labels[index] if self._labels else index}

  def example_name(self, index):
    return f"images/{index}.png"


def take(count, *args, **options):
  with train_batches(*args, **options) as batches:
    return [next(batches) for _ in range(count)]


def joined(hosts):
  """Concatenates the hosts' batches to global batches."""
  for parts in zip(*hosts, strict=True):
    yield {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_same(batches, others):
  for one, other in zip(batches, others, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


@pytest.fixture(scope="module")
def reference():
  return take(12, Images(30), RANDOM, batch_size=8, seed=3)


class TestTrain:
  def test_batch_keys_shapes_dtypes(self, reference):
    for batch in reference:
      assert set(batch) == {"image", "label"}
      assert (batch["image"].shape, batch["image"].dtype) == ((8, 16, 16, 3), np.uint8)
      assert (batch["label"].shape, batch["label"].dtype) == ((8,), np.int32)

  @pytest.mark.parametrize("hosts", [1, 2, 4])
  def test_hosts_split_global_batch(self, reference, hosts):
    parts = [
      take(12, Images(30), RANDOM, batch_size=8, seed=3, process_index=p, process_count=hosts)
      for p in range(hosts)
    ]
    assert_same(joined(parts), reference)

  def test_batches_independent_of_threads(self, reference):
    assert_same(take(12, Images(30), RANDOM, batch_size=8, seed=3, num_threads=3), reference)

  def test_batches_independent_of_worker_processes(self, reference):
    options = dict(batch_size=8, seed=3, start_step=5, num_workers=2)
    assert_same(take(7, Images(30), RANDOM, **options), reference[5:])

  @pytest.mark.parametrize("step", [1, 5, 11])
  def test_resume_same_batches(self, reference, step):
    options = dict(batch_size=8, seed=3, start_step=step)
    assert_same(take(12 - step, Images(30), RANDOM, **options), reference[step:])

  def test_resume_with_other_host_count(self, reference):
    options = dict(batch_size=8, seed=3, start_step=9, process_count=2)
    parts = [take(3, Images(30), RANDOM, **options, process_index=p) for p in range(2)]
    assert_same(joined(parts), reference[9:])

  def test_resume_at_large_step(self):
    batch = take(1, Images(30), PLAIN, batch_size=8, seed=3, start_step=10**9)[0]
    assert batch["label"].max() < 30

  def test_epochs_are_permutations(self):
    labels = np.concatenate(
      [b["label"] for b in take(12, Images(24), PLAIN, batch_size=8, seed=0)]
    ).reshape(4, 24)
    for epoch in labels:
      assert sorted(epoch) == list(range(24))
    assert len({tuple(epoch) for epoch in labels}) == 4

  def test_epoch_not_multiple_of_batch_size(self):
    batches = take(7, Images(10), PLAIN, batch_size=4, seed=0)
    labels = np.concatenate([b["label"] for b in batches])
    assert sorted(labels[:10]) == sorted(labels[10:20]) == list(range(10))

  @pytest.mark.parametrize("count", [1, 3])
  def test_fewer_examples_than_batch(self, count):
    batch = take(1, Images(count), PLAIN, batch_size=6, seed=0)[0]
    assert np.bincount(batch["label"]).tolist() == [6 // count] * count

  def test_seed_changes_order(self, reference):
    other = take(1, Images(30), RANDOM, batch_size=8, seed=4)[0]
    assert not np.array_equal(other["label"], reference[0]["label"])

  def test_augmentation_differs_by_epoch_and_row(self):
    batches = take(4, Images(1), RANDOM, batch_size=4, seed=0)
    images = {image.tobytes() for batch in batches for image in batch["image"]}
    assert len(images) > 12

  @pytest.mark.parametrize("hosts", [1, 2])
  def test_aug_repeats(self, hosts):
    options = dict(batch_size=12, seed=3, repeats=3, process_count=hosts)
    parts = [take(4, Images(16), RANDOM, **options, process_index=p) for p in range(hosts)]
    batches = list(joined(parts))
    once = take(4, Images(16), RANDOM, batch_size=4, seed=3)
    for batch, few in zip(batches, once, strict=True):
      np.testing.assert_array_equal(batch["label"], np.tile(few["label"], 3))
      images = {image.tobytes() for image in batch["image"]}
      assert len(images) > 10
      assert all(batch["label"] != np.roll(batch["label"], 1))  # mixup's neighbours
    assert sorted(np.concatenate([b["label"][:4] for b in batches])) == list(range(16))

  def test_encoded_images_decoded(self):
    flips = build_transforms([dict(name="one_hot", num_classes=50)])
    batch = take(1, Images(9), flips, batch_size=3, seed=0)[0]
    assert batch["image"].shape == (3, 20, 24, 3)
    assert batch["label"].shape == (3, 50)


class TestEval:
  @pytest.mark.parametrize("hosts", [1, 2, 4])
  @pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 21])
  def test_every_example_evaluated_once(self, hosts, count):
    source = Images(count)
    parts = [
      eval_batches(source, PLAIN, batch_size=8, process_index=p, process_count=hosts)
      for p in range(hosts)
    ]
    assert {len(part) for part in parts} == {-(-count // 8)}
    seen = []
    for batch in joined(parts):
      assert batch["image"].shape == (8, 8, 8, 3)
      assert batch["mask"].dtype == bool
      seen += batch["label"][batch["mask"]].tolist()
      assert not batch["image"][~batch["mask"]].any()
    assert seen == list(range(count))

  def test_second_iteration_equal(self):
    batches = eval_batches(Images(9), RANDOM, batch_size=4)
    assert_same(list(batches), list(batches))

  def test_first_batch(self):
    options = dict(batch_size=4, process_index=1, process_count=2)
    batches = eval_batches(Images(9), RANDOM, **options)
    assert_same([batches.first_batch()], [next(iter(batches))])

  def test_one_example_shapes(self):
    batches = eval_batches(Images(9, corrupt=[0]), PLAIN, batch_size=4, on_corrupt="skip")
    one, *others = ({k: (v.shape[1:], v.dtype) for k, v in b.items()}
                    for b in (batches.one_example(), *batches))  # fmt: skip
    assert others == [one] * 3

  @pytest.mark.slow
  def test_eval_batches_independent_of_worker_processes(self):
    one, other = (
      list(eval_batches(Images(9), RANDOM, batch_size=4, num_workers=w)) for w in (0, 2)
    )
    assert_same(one, other)


class TestCorrupt:
  def test_error_names_example(self):
    with pytest.raises(CorruptExampleError) as error:
      take(4, Images(10, corrupt=[7]), PLAIN, batch_size=4, seed=0)
    assert "images/7.png" in str(error.value)
    assert "on_corrupt='skip'" in str(error.value)
    assert "\n" not in str(error.value)

  def test_error_from_worker_process(self):
    with pytest.raises(CorruptExampleError, match=r"images/7.png"):
      take(4, Images(10, corrupt=[7]), PLAIN, batch_size=4, seed=0, num_workers=1)

  @pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
  def test_skip_logs_once_and_counts(self, workers, caplog):
    source = Images(10, corrupt=[7, 2])
    options = dict(batch_size=5, seed=0, on_corrupt="skip", num_workers=workers)
    with train_batches(source, PLAIN, **options) as batches:
      labels = np.stack([next(batches)["label"] for _ in range(6)]).reshape(3, 10)
    assert not np.isin(labels, [2, 7]).any()
    assert set(batches.skipped) == {"images/2.png", "images/7.png"}
    assert (
      min(batches.skipped.values()) >= 3
    )  # once per epoch, or more if it was drawn as a replacement
    assert batches.num_skipped == sum(batches.skipped.values())
    named = [r.getMessage() for r in caplog.records if "corrupt" in r.getMessage()]
    assert len(named) == 2

  def test_replacements_independent_of_hosts_and_start(self):
    source = Images(10, corrupt=[7, 2])
    options = dict(batch_size=4, seed=0, on_corrupt="skip")
    whole = take(6, source, RANDOM, **options)
    assert_same(take(2, source, RANDOM, **options, start_step=4), whole[4:])
    hosts = [take(6, source, RANDOM, **options, process_index=p, process_count=2) for p in range(2)]
    assert_same(joined(hosts), whole)

  def test_eval_num_skipped_of_last_iteration(self):
    batches = eval_batches(Images(10, corrupt=[7, 2]), PLAIN, batch_size=4, on_corrupt="skip")
    assert batches.num_skipped == 0
    for _ in range(2):
      iterator = iter(batches)
      seen = [(next(iterator)["mask"].sum(), batches.num_skipped) for _ in range(3)]
      assert seen == [(3, 1), (3, 2), (2, 2)]
      assert iterator.num_skipped == 2

  def test_all_examples_corrupt_raises(self):
    with pytest.raises(CorruptExampleError, match="in a row are corrupt"):
      take(1, Images(3, corrupt=range(3)), PLAIN, batch_size=2, seed=0, on_corrupt="skip")
    batches = eval_batches(Images(3, corrupt=range(3)), PLAIN, batch_size=2, on_corrupt="skip")
    with pytest.raises(CorruptExampleError, match="the first 3 examples"):
      list(batches)

  @pytest.mark.parametrize("hosts", [1, 2])
  def test_eval_skip_masks_examples(self, hosts):
    source = Images(9, corrupt=[0, 1, 4])
    options = dict(batch_size=4, process_count=hosts, on_corrupt="skip")
    iterators = [
      iter(eval_batches(source, PLAIN, **options, process_index=p)) for p in range(hosts)
    ]
    whole = list(joined([list(it) for it in iterators]))
    seen = np.concatenate([b["label"][b["mask"]] for b in whole]).tolist()
    assert seen == [2, 3, 5, 6, 7, 8]
    assert sum(it.num_skipped for it in iterators) == 3

  def test_eval_raises_by_default(self):
    with pytest.raises(CorruptExampleError, match=r"images/4\.png"):
      list(eval_batches(Images(9, corrupt=[4]), PLAIN, batch_size=4))


class TestErrors:
  @pytest.mark.parametrize("labels", [[0, 1, 5], [0, -1, 1]])
  def test_label_out_of_range_raises(self, labels):
    source = Images(3, num_classes=5, labels=labels)
    bad = next(label for label in labels if not 0 <= label < 5)
    for batches in (
      train_batches(source, PLAIN, batch_size=3, seed=0),
      iter(eval_batches(source, PLAIN, batch_size=3)),
    ):
      with pytest.raises(ValueError, match=r"images/[12]\.png has label") as error:
        next(batches)
      assert f"has label {bad}, expected 0..4 (num_classes=5)" in str(error.value)

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      ({"repeats": 3}, "data.train.aug_repeats: 3"),
      ({"repeats": 0}, "data.train.aug_repeats: 0"),
      ({"repeats": 2, "buckets": 2}, "data.train.aug_repeats"),
    ],
  )
  def test_invalid_aug_repeats_raises(self, options, message):
    with pytest.raises(ValueError, match=message):
      train_batches(Images(3), PLAIN, batch_size=8, seed=0, **options)

  def test_num_classes_of_model_checked(self):
    with pytest.raises(ValueError, match=r"0\.\.1 \(num_classes=2\)"):
      take(1, Images(9), PLAIN, batch_size=9, seed=0, num_classes=2)

  def test_different_shapes_raise(self, class_folders):
    source = load_source(f"folder:{class_folders}", "train")
    with pytest.raises(ValueError, match=r"'image' .*resize"):
      take(1, source, (), batch_size=8, seed=0)

  def test_multilabel_needs_multi_hot(self, prepared):
    source = load_source("tfds:tiny", "train", data_dir=str(prepared), label_key="labels")
    with pytest.raises(ValueError, match=r"'label' .*multi_hot"):
      take(1, source, PLAIN, batch_size=8, seed=0)
    many = (*PLAIN, *build_transforms([dict(name="multi_hot", num_classes=5)]))
    batch = take(1, source, many, batch_size=20, seed=0)[0]
    assert batch["label"].dtype == np.float32
    assert batch["label"].sum() == 4 * (0 + 1 + 2 + 3 + 4)

  def test_transform_error_names_example(self):
    crop = build_transforms([dict(name="central_crop", size=99)])
    with pytest.raises(ValueError, match=r"images/\d\.png: .*99x99"):
      take(1, Images(8), crop, batch_size=4, seed=0)

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      (dict(batch_size=5, process_count=2), "batch_size is 5"),
      (dict(batch_size=0), "batch_size is 0"),
      (dict(batch_size=4, on_corrupt="skpi"), "did you mean 'skip'"),
    ],
  )
  def test_invalid_arguments_raise(self, options, message):
    with pytest.raises((ValueError, TypeError)) as error:
      train_batches(Images(4), PLAIN, seed=0, **options)
    assert message in str(error.value)

  def test_empty_source_raises(self):
    with pytest.raises(ValueError, match="images has no example"):
      train_batches(Images(0), PLAIN, batch_size=4, seed=0)


def test_demo_source_batches():
  source = load_source("demo:photos", "train")
  transforms = build_transforms(
    [dict(name="random_resized_crop", size=32), dict(name="random_flip")]
  )
  with train_batches(source, transforms, batch_size=16, seed=0) as batches:
    images = [batch["image"] for batch in itertools.islice(batches, 3)]
  assert all(image.shape == (16, 32, 32, 3) for image in images)
  assert np.std(images) > 20


def test_worker_processes_no_backend_exit_with_parent(tmp_path):
  """Grain imports jax but initialises no backend; workers block SIGINT and SIGTERM."""
  script = tmp_path / "script.py"
  script.write_text(
    """
import os, signal, sys
import numpy as np
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.pipeline import train_batches

def look(example, rng):
  bridge = sys.modules.get("jax._src.xla_bridge")
  started = bridge and bridge.backends_are_initialized()
  blocked = {signal.SIGINT, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
  return {"found": np.array([bool(started), blocked])}

def main():
  source = load_source("demo:digits", "train")
  with train_batches(source, (look,), batch_size=4, seed=0, num_workers=1) as batches:
    print(next(batches)["found"][0].tolist())
    print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
  main()
"""
  )
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  command = [sys.executable, str(script)]
  done = subprocess.run(  # until the worker's pipes are closed, too
    command, capture_output=True, text=True, check=False, env=env, timeout=60
  )
  assert done.stdout == "[False, True]\nset()\n"
  assert "Error" not in done.stderr


def test_source_of_another_task_named():
  transforms = build_transforms([dict(name="load_objects"), dict(name="pad_objects")])
  with pytest.raises(ValueError, match=r"images/\d\.png: the data has no 'boxes_xyxy'"):
    take(1, Images(4), transforms, batch_size=2, seed=0)
