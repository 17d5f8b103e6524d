"""The demo shapes: one set of records for classification, detection and segmentation."""

import itertools

import numpy as np
import pytest

from vit_jax_zoo.data.images import decode_image
from vit_jax_zoo.data.sources import demo, load_source
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.data.transforms.detection import decode_segments


@pytest.fixture(scope="module")
def small_shapes(tmp_path_factory):
  """Prepares a few of the scenes in a cache of their own."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("VIT_JAX_ZOO_CACHE", str(tmp_path_factory.mktemp("shapes")))
    patch.setattr(demo, "SHAPE_COUNTS", {"train": 60, "test": 20})
    load_source("demo:shapes", "train")
    yield


@pytest.mark.usefixtures("small_shapes")
class TestShapes:
  def test_same_records_for_all_tasks(self):
    """The label is the class of the largest shape; things are equal with and without stuff."""
    options = ({"label_key": "label"}, {}, {"panoptic": True})
    sources = [load_source("demo:shapes", "train", **o) for o in options]
    assert [source.info.class_names for source in sources] == [
      demo.SHAPES, demo.SHAPES, (*demo.SHAPES, *demo.SURFACES)
    ]  # fmt: skip
    for labelled, things, everything in zip(*sources, strict=True):
      assert labelled["image"] == things["image"] == everything["image"]
      is_thing = everything["labels"] < len(demo.SHAPES)
      np.testing.assert_array_equal(things["labels"], everything["labels"][is_thing])
      np.testing.assert_array_equal(things["boxes_xyxy"], everything["boxes_xyxy"][is_thing])
      sides = (things["boxes_xyxy"][:, 2:] - things["boxes_xyxy"][:, :2]).max(axis=1)
      assert things["labels"][sides.argmax()] == labelled["label"]
      assert 1 <= len(sides) <= 6

  def test_annotations_match_segments(self):
    source = load_source("demo:shapes", "test", panoptic=True)
    for example in (source[i] for i in range(len(source))):
      segments = decode_segments(example["segment_image"], example)
      for number, box in enumerate(example["boxes_xyxy"]):
        rows, columns = np.nonzero(segments == number)
        edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(box, edges, atol=1e-4)
        assert example["area"][number] == len(rows)

  def test_label_map_has_all_pixels(self):
    source = load_source("demo:shapes", "test", panoptic=True)
    (transform,) = build_transforms([{"name": "load_label_map"}])
    found = transform.for_source(source)(source[0], np.random.default_rng(0))["label_map"]
    assert found.shape == (demo.SIZE, demo.SIZE)
    assert set(np.unique(found)) == set(source[0]["labels"])


def test_silhouettes_differ():
  """Each fits into a disk, so that it can be turned, and differs from all turns of the others."""
  turned = {name: [] for name in demo.SHAPES}
  for name, opacity in zip(demo.SHAPES, demo.silhouettes(), strict=True):
    y, x = (np.mgrid[:64, :64] + 0.5) / 32 - 1
    assert 0 <= opacity.min() < opacity.max() <= 1
    assert opacity[np.hypot(x, y) > 1].max() == 0
    assert opacity.mean() > 0.1
    rng = np.random.default_rng(0)
    turned[name] = np.stack([demo._turned(opacity, 32, rng) for _ in range(24)])
  for one, other in itertools.combinations(demo.SHAPES, 2):
    distance = np.abs(turned[one][:, None] - turned[other]).mean(axis=(2, 3))
    assert distance.min() > 0.02, (one, other)


def test_more_scenes_than_prepared():
  """Any number can be drawn; the first ones are the same."""
  few, many = (list(demo.shapes("train", count)) for count in (2, 4))
  assert [r["image"] for r in few] == [r["image"] for r in many][:2]
  assert len({r["image/id"] for r in many}) == 4
  assert decode_image(many[3]["image"]).shape == (demo.SIZE, demo.SIZE, 3)
