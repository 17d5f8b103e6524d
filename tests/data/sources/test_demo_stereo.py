"""The stereo demo: its contents, and a test strip that is not in the training set."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax_zoo.data.sources import demo as demo_stereo
from vit_jax_zoo.data.sources import load_source


@pytest.fixture(scope="module")
def splits():
  sources = {split: load_source("demo:stereo", split) for split in ("train", "test")}
  return {
    split: [{k: decode(e[k]) for k in ("image", "reference")} for e in source]
    for split, source in sources.items()
  }


def decode(data):
  return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_image_sizes(splits):
  assert [e["image"].shape for e in splits["test"]] == [(96, 112, 3)] * 6
  assert [e["reference"].shape for e in splits["test"]] == [(96, 168, 3)] * 6
  for example in splits["train"]:
    assert example["image"].shape == example["reference"].shape == (160, 256, 3)
  assert len(splits["train"]) > 40


def test_test_strip_equals_stereo_pair(splits):
  left, right = demo_stereo.read_stereo()
  strip = np.concatenate([e["image"] for e in splits["test"]], axis=1)
  start = (left.shape[1] % 112) // 2
  np.testing.assert_array_equal(strip, left[232:328, start : start + 672])
  np.testing.assert_array_equal(
    splits["test"][2]["reference"], right[232:328, start + 196 :][:, :168]
  )


def test_reference_matches_image(splits):
  """The centre of a test image matches its own reference better than another's."""

  def nearest(image, reference):
    middle = image[40:56, 48:64]
    shifts = range(reference.shape[1] - 16)
    return min(np.abs(middle - reference[40:56, x : x + 16]).mean() for x in shifts)

  own = [nearest(e["image"], e["reference"]) for e in splits["test"]]
  tests = splits["test"]
  other = [nearest(e["image"], tests[(i + 3) % 6]["reference"]) for i, e in enumerate(tests)]
  assert np.mean(np.array(own) < other) > 0.8
  assert np.mean(own) < 0.6 * np.mean(other)


def test_test_strip_not_in_training_windows(splits):
  held_out = set()
  for eye in demo_stereo.read_stereo():
    for row in range(232, 328):
      held_out |= {eye[row, x : x + 16].astype(int).tobytes() for x in range(0, 690, 1)}
  for example in splits["train"]:
    for image in example.values():
      pieces = {image[y, x : x + 16].tobytes() for y in range(0, 160, 5) for x in (0, 100, 200)}
      assert not pieces & held_out
