"""Bucketed batches: complete epochs, independent of hosts, little padding."""

import numpy as np
import pytest

from tests.data.images import encode, photo
from vit_jax_zoo.data import buckets
from vit_jax_zoo.data.pipeline import eval_batches, train_batches
from vit_jax_zoo.data.sources.base import DatasetInfo, Source
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.data.transforms.detection import objects_example

SIZES = ((24, 32), (32, 24), (20, 40), (28, 28))
SHAPES = ((40, 64), (64, 40))
TRAIN = build_transforms(
  [
    dict(name="load_objects", masks=True),
    dict(name="random_flip"),
    dict(name="resize_shorter", shorter=(24, 30, 36), longest=60),
    dict(name="pad_objects", num=3),
  ]
)
EVAL = build_transforms(
  [dict(name="load_objects", as_annotated=True), dict(name="pad_objects", num=3)]
)


class Objects(Source):
  """Images of four sizes with one object, a quarter of the image; its area is its index."""

  def __init__(self, count=40, corrupt=()):
    self.info = DatasetInfo("objects", count, 5)
    self._files = [encode(photo(*size, seed=i), "PNG") for i, size in enumerate(SIZES)]
    self._corrupt = corrupt

  def __getitem__(self, index):
    height, width = SIZES[index % 4]
    data = self._files[index % 4][: 40 if index in self._corrupt else None]
    box = [width / 4, height / 4, width * 3 / 4, height * 3 / 4]
    x = [box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]
    example = objects_example(data, index, [box], [4], is_crowd=[False], area=[index], ids=[1])
    return example | {"outlines": [[x]]}

  def example_name(self, index):
    return f"objects/{index}"


def train(steps=8, start=0, batch_size=8, hosts=1, source=None, **options):
  """Returns the global batches of a run."""
  batches = []
  for host in range(hosts):
    with train_batches(
      source or Objects(),
      TRAIN,
      batch_size=batch_size,
      seed=3,
      start_step=start,
      process_index=host,
      process_count=hosts,
      buckets=options.pop("buckets", SHAPES) if hosts == 1 else SHAPES,
      **options,
    ) as iterator:
      batches.append([next(iterator) for _ in range(steps)])
  return [
    {key: np.concatenate([batch[key] for batch in parts]) for key in parts[0]}
    for parts in zip(*batches, strict=True)
  ]


@pytest.fixture(scope="module")
def reference():
  return train()


WINDOW_SHAPES = ((24, 32), (32, 24), (30, 40), (40, 30), (36, 60), (60, 36))


@pytest.fixture(scope="module")
def window():
  """The batches that are sorted together: 640 positions, 16 epochs of 40."""
  return train(steps=buckets.WINDOW, batch_size=5, buckets=WINDOW_SHAPES)


def same(one, other):
  assert one.keys() == other.keys()
  for key in one:
    np.testing.assert_array_equal(one[key], other[key])


class TestTrain:
  def test_padding_and_boxes(self, reference):
    """Zeros beyond `image_size`; masks agree with boxes."""
    for batch in reference:
      assert batch["image"].shape[1:3] in ((40, 64), (64, 40), (64, 64))
      for row, (height, width) in enumerate(batch["image_size"]):
        assert not batch["image"][row, height:].any()
        assert not batch["image"][row, :, width:].any()
        assert batch["image"][row, :height, :width].std() > 10
        rows, columns = np.nonzero(batch["masks"][row, 0])
        box = [columns.mean() / width, rows.mean() / height]
        np.testing.assert_allclose(box, batch["boxes_cxcywh"][row, 0, :2], atol=0.05)

  def test_batches_independent_of_hosts_and_resume(self, reference):
    for one, other in zip(reference, train(hosts=2, num_threads=1), strict=True):
      same(one, other)
    for one, other in zip(reference[5:], train(steps=3, start=5), strict=True):
      same(one, other)

  def test_window_has_every_example_once_per_epoch(self, window):
    ids = np.concatenate([batch["image_id"] for batch in window])
    np.testing.assert_array_equal(np.bincount(ids), np.full(40, 16))

  def test_less_padding_and_random_order(self, window):
    """Less padding than without sorting; batch areas are not correlated with time."""
    padded = sum(batch["image"][..., 0].size for batch in window)
    real = sum(int(batch["image_size"].prod(axis=1).sum()) for batch in window)
    assert padded / real < 1.6
    areas = [batch["image"].shape[1] * batch["image"].shape[2] for batch in window]
    assert np.abs(np.corrcoef(areas, np.arange(len(areas)))[0, 1]) < 0.6
    assert len({batch["image"].shape for batch in window}) <= 7

  def test_corrupt_image_replaced_within_batch(self):
    source = Objects(corrupt=(7, 22))
    batches = train(steps=20, source=source, on_corrupt="skip")
    ids = np.concatenate([batch["image_id"] for batch in batches])
    assert not {7, 22} & set(ids.tolist())
    assert len(ids) == 160


class TestEval:
  def score(self, batch_size, hosts=1):
    """Returns each example's padded image by its id."""
    found = {}
    counts = []
    for host in range(hosts):
      batches = eval_batches(
        Objects(42),
        EVAL,
        batch_size=batch_size,
        process_index=host,
        process_count=hosts,
        buckets=((24, 40), (32, 28)),
      )
      counts.append(len(batches))
      for batch in batches:
        for row in np.flatnonzero(batch["mask"]):
          number = int(batch["image_id"][row])
          assert number not in found
          found[number] = batch["image"][row]
    assert len(set(counts)) == 1  # the hosts run the same number of steps
    return found

  def test_padding_independent_of_batch_and_hosts(self):
    reference = self.score(4)
    assert sorted(reference) == list(range(42))
    assert {image.shape[:2] for image in reference.values()} == {(24, 40), (32, 28)}
    for batch_size, hosts in ((1, 1), (6, 2), (40, 4)):
      for number, image in self.score(batch_size, hosts).items():
        np.testing.assert_array_equal(image, reference[number])

  def test_fill_rows_are_zero(self):
    """Rows that complete the last batch of a bucket."""
    for batch in eval_batches(Objects(5), EVAL, batch_size=4, buckets=SHAPES):
      assert not batch["image"][~batch["mask"]].any()
      assert not batch["is_target"][~batch["mask"]].any()


class TestChoice:
  def test_choose_buckets_holds_all_images(self):
    """Four buckets need less padding than one."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 7, (60, 2)) * 32
    chosen = buckets.Buckets(buckets.choose_buckets(sizes, 3))
    assert len(chosen.shapes) <= 4
    for height, width in sizes.tolist():
      bucket = chosen.find(height, width)
      assert bucket[0] >= height
      assert bucket[1] >= width
    one = len(sizes) * int(sizes.max(axis=0).prod())
    few = sum(int(np.prod(chosen.find(*size))) for size in sizes.tolist())
    assert few < 0.85 * one

  def test_choose_buckets_keeps_orientations_apart(self):
    sizes = np.array([[480, 640]] * 50 + [[640, 480]] * 20 + [[470, 630]] * 5)
    assert set(buckets.choose_buckets(sizes, 2)) == {(480, 640), (640, 480)}
    assert buckets.choose_buckets(sizes, 1) == ((640, 640),)


class TestErrors:
  @pytest.mark.parametrize(
    ("given", "message"),
    [
      (0, "expected at least 1, or pairs"),
      ((), "expected at least one"),
      (((32,),), "expected pairs"),
      (((32, 0),), "expected pairs"),
      (((32, 32),), "in none of the buckets"),
    ],
  )
  def test_invalid_buckets_raise(self, given, message):
    with pytest.raises(ValueError, match=message) as error:
      train(steps=1, buckets=given)
    assert "\n" not in str(error.value)

  def test_sizes_without_buckets_raise(self):
    with pytest.raises(ValueError, match=r"or set data\.loader\.buckets"):
      train(steps=1, buckets=None)
