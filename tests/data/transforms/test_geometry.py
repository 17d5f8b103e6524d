"""Joint transforms of images, boxes, masks and labels: against DETR's own, and by hand."""

import numpy as np
import pytest

from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.data.transforms import detection as scaling

SCALING = [
  dict(name="random_scale_crop", shorter=(50, 60, 70), longest=100, crop_from=(40, 55)),
  dict(name="random_flip"),
]
SCALING[0]["crop_sides"] = (30, 50)


@pytest.fixture
def official(load_golden):
  """The image, annotations and results of the official transforms."""
  config, inputs, outputs = load_golden("detr_transforms_a")
  example = {
    "image": inputs["tf_image"],
    "boxes_xyxy": inputs["tf_boxes"].astype(np.float32),
    "labels": inputs["tf_labels"].astype(np.int32),
    "masks": inputs["tf_masks"].astype(bool),
  }
  return config["transforms"], example, outputs


def check(example, outputs, name):
  np.testing.assert_allclose(example["boxes_xyxy"], outputs[f"tf_{name}_boxes"], atol=1e-4)
  np.testing.assert_array_equal(example["masks"], outputs[f"tf_{name}_masks"])
  np.testing.assert_array_equal(example["labels"], outputs[f"tf_{name}_labels"])


class TestOfficial:
  def test_scaled_size_equals_official(self, load_golden):
    """Includes the rounding when the longer side is bounded."""
    _, inputs, outputs = load_golden("detr_transforms_a")
    ours = [scaling.scaled_size((h, w), 800, 1333) for w, h in inputs["size_wh"].tolist()]
    np.testing.assert_array_equal(ours, outputs["size_hw_800_1333"])

  @pytest.mark.parametrize("name", ["resize", "resize_max", "resize_up"])
  def test_resize_equals_official(self, official, name):
    """Pillow's filter for the image, torch's nearest for masks."""
    config, example, outputs = official
    shorter, longest = config["resize"][name]
    transform = scaling.ResizeShorter(shorter, longest)
    result = transform(example, np.random.default_rng(0))
    np.testing.assert_array_equal(result["image"], outputs[f"tf_{name}_image"])
    check(result, outputs, name)

  def test_mirror_equals_official(self, official):
    _, example, outputs = official
    result = scaling.Mirror()(example)
    check(result, outputs, "hflip")
    np.testing.assert_array_equal(result["image"], example["image"][:, ::-1])

  def test_window_equals_official(self, official):
    """Boxes are clipped; objects outside are dropped with their masks and labels."""
    config, example, outputs = official
    top, left, height, width = config["crop_region_i_j_h_w"]
    check(scaling.Window(top, left, height, width)(example), outputs, "crop")

  def test_pad_objects_equals_official(self, official):
    """Boxes are (center_x, center_y, width, height) as fractions of the image."""
    _, example, outputs = official
    (pad,) = build_transforms([dict(name="pad_objects", num=7)])
    zeros = np.zeros(5, np.float32)
    extra = {"is_crowd": zeros > 0, "area": zeros, "object_ids": np.arange(5)}
    result = pad({**example, **extra}, np.random.default_rng(0))
    np.testing.assert_allclose(result["boxes_cxcywh"][:5], outputs["tf_norm_boxes"], atol=1e-6)
    assert result["is_target"].tolist() == [True] * 5 + [False] * 2
    assert result["masks"].shape == (7, *example["image"].shape[:2])
    assert not result["masks"][5:].any()
    assert result["image_size"].tolist() == list(example["image"].shape[:2])


def marked(height=60, width=80):
  """Returns an example whose colours, masks and label map all encode a pixel's quadrant."""
  quarter = 2 * (np.arange(height) >= height // 2)[:, None] + (np.arange(width) >= width // 2)
  boxes = [[0, 0, 40, 30], [40, 0, 80, 30], [0, 30, 40, 60], [40, 30, 80, 60]]
  return {
    "image": np.repeat((60 * quarter[..., None]).astype(np.uint8), 3, axis=2),
    "boxes_xyxy": np.array(boxes, np.float32),
    "labels": np.arange(4),
    "masks": quarter == np.arange(4)[:, None, None],
    "label_map": quarter.astype(np.uint8),
  }


def test_image_boxes_masks_labels_aligned():
  rng = np.random.default_rng(0)
  transforms = build_transforms(SCALING)
  seen = set()
  for _ in range(40):
    example = marked()
    for transform in transforms:
      example = transform(example, rng)
    height, width = example["image"].shape[:2]
    seen.add((height, width))
    assert example["masks"].shape[1:] == example["label_map"].shape == (height, width)
    for label, mask, box in zip(
      example["labels"], example["masks"], example["boxes_xyxy"], strict=True
    ):
      left, top, right, bottom = box
      assert 0 <= left < right <= width + 1e-4
      assert 0 <= top < bottom <= height + 1e-4
      inner = (slice(int(top) + 3, int(bottom) - 3), slice(int(left) + 3, int(right) - 3))
      assert mask[inner].all()
      assert (example["label_map"][inner] == label).all()
      assert (example["image"][inner] == 60 * label).all()
      assert mask.sum() == pytest.approx((right - left) * (bottom - top), rel=0.2, abs=60)
  assert len(seen) > 10


def test_output_size_equals_transformed_size():
  """Buckets rely on it: output_size draws the same random numbers as the transform."""
  transforms = build_transforms([*SCALING, dict(name="resize_shorter", shorter=(20, 30, 40))])
  for seed in range(20):
    example, rng, ahead = marked(), np.random.default_rng(seed), np.random.default_rng(seed)
    size = example["image"].shape[:2]
    for transform in transforms:
      example, size = transform(example, rng), transform.output_size(size, ahead)
    assert size == example["image"].shape[:2]


def test_random_scale_crop_distribution():
  """All scales occur, half of the images are cropped, sides are bounded."""
  transform, rng = scaling.RandomScaleCrop(), np.random.default_rng(0)
  plans = [transform.plan((480, 640), rng) for _ in range(2000)]
  cropped = [plan for plan in plans if len(plan) == 3]
  assert 0.46 < len(cropped) / len(plans) < 0.54
  assert {min(plan[-1]) for plan in plans if len(plan) == 1} == set(scaling.SHORTER_SIDES)
  assert {min(plan[0]) for plan in cropped} == {400, 500, 600}
  sides = [side for plan in cropped for side in plan[1][2:]]
  assert (min(sides), max(sides)) == (384, 600)
  assert max(side for plan in plans for side in plan[-1]) <= 1333


def test_output_size_not_implemented_raises():
  """For transforms that move pixels but not boxes."""
  (crop,) = build_transforms([dict(name="random_crop", size=8)])
  with pytest.raises(ValueError, match=r"random_crop.*data\.loader\.buckets"):
    crop.output_size((20, 20), np.random.default_rng(0))
