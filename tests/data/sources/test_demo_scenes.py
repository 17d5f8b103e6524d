"""The demo scenes: annotations match the pixels; the splits are disjoint."""

import numpy as np
import pytest

from vit_jax_zoo.data.images import decode_image
from vit_jax_zoo.data.sources import demo as demo_scenes
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms.detection import decode_segments

NAMES = (*"0123456789", *demo_scenes.TEXTURES)


@pytest.fixture(scope="module")
def small_scenes(tmp_path_factory):
  """Prepares a hundredth of the scenes in a cache of their own."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("VIT_JAX_ZOO_CACHE", str(tmp_path_factory.mktemp("scenes")))
    patch.setattr(demo_scenes, "COUNTS", {"train": 40, "test": 20})
    load_source("demo:scenes", "train")
    yield


@pytest.mark.usefixtures("small_scenes")
class TestScenes:
  def test_annotations_match_segments(self):
    """Each box is its segment's bounding box; each area is its number of pixels."""
    source = load_source("demo:scenes", "train", panoptic=True)
    assert source.info.class_names == NAMES
    for i in range(len(source)):
      example = source[i]
      segments = decode_segments(example["segment_image"], example)
      assert segments.min() == 0  # every pixel belongs to a segment
      for number, box in enumerate(example["boxes_xyxy"]):
        rows, columns = np.nonzero(segments == number)
        edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(box, edges, atol=1e-4)
        assert example["area"][number] == len(rows)

  def test_detection_only_digits(self):
    """Things are equal in both views of a scene; only the panoptic view has stuff."""
    things = load_source("demo:scenes", "test")
    everything = load_source("demo:scenes", "test", panoptic=True)
    assert things.info.num_classes == 10
    for i in range(len(things)):
      one, both = things[i], everything[i]
      assert one["image_id"] == both["image_id"]
      digits = both["labels"] < 10
      np.testing.assert_array_equal(one["labels"], both["labels"][digits])
      np.testing.assert_array_equal(one["boxes_xyxy"], both["boxes_xyxy"][digits])
      assert 1 <= len(one["labels"]) <= demo_scenes.MAX_DIGITS

  def test_image_ids_unique(self):
    sources = [load_source("demo:scenes", split) for split in ("train", "test")]
    ids = [source[i]["image_id"] for source in sources for i in range(len(source))]
    assert len(set(ids)) == len(ids) == 60


def test_splits_disjoint():
  """No digit and no patch of a photograph is in both splits."""
  train_digits, _, train_squares = demo_scenes.read_material("train")
  test_digits, labels, test_squares = demo_scenes.read_material("test")
  assert len(train_digits) + len(test_digits) == 1797
  assert 0.19 < len(test_digits) / 1797 < 0.21
  assert set(np.bincount(labels) // 10) == {3}  # stratified
  train = {digit.tobytes() for digit in train_digits}
  assert sum(digit.tobytes() in train for digit in test_digits) == 0
  for here, there in zip(train_squares, test_squares, strict=True):
    assert len(here) >= 3 * len(there) >= 6
    places = {place.tobytes() for place in here}
    assert not any(place.tobytes() in places for place in there)


def test_draw_scene_deterministic():
  """Also: digits are brighter than their surroundings."""
  material = demo_scenes.read_material("test")
  scene, again = (demo_scenes.draw_scene(material, np.random.default_rng(5)) for _ in range(2))
  np.testing.assert_array_equal(scene.image, again.image)
  assert scene.labels == again.labels
  assert scene.image.shape == (demo_scenes.SIZE, demo_scenes.SIZE, 3)
  digit = len(scene.labels) - 1  # the front object
  assert scene.labels[digit] < 10 <= min(scene.labels[:2])
  assert scene.image[scene.segment_map == digit].max(axis=1).mean() > 180


def test_record_jpeg_close_to_scene():
  scene = demo_scenes.draw_scene(demo_scenes.read_material("test"), np.random.default_rng(3))
  record = demo_scenes._record(scene, 0)
  assert np.abs(decode_image(record["image"]).astype(int) - scene.image).mean() < 6
