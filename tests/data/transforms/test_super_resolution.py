"""Low-resolution, target and blurred reference images, as in TTSR's published data code."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax_zoo.data.transforms.super_resolution import (
  REFERENCES,
  TARGETS,
  PadPair,
  RandomPairCrop,
  RandomPairTurn,
  SuperResolutionPair,
  enlarge,
  shrink,
)

ALL_IMAGES = TARGETS + REFERENCES


def noise(*size, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def rng(seed=0):
  return np.random.default_rng(seed)


def bicubic(image, height, width):
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def test_test_pair_equals_published():
  image, reference = noise(27, 34), noise(19, 21, seed=1)
  found = SuperResolutionPair()({"image": image, "reference": reference}, rng())
  small = bicubic(image[:24, :32], 6, 8)
  np.testing.assert_array_equal(found["image"], image[:24, :32])
  np.testing.assert_array_equal(found["low_res_image"], small)
  np.testing.assert_array_equal(found["upsampled_image"], bicubic(small, 24, 32))
  np.testing.assert_array_equal(found["ref_image"], reference[:16, :20])
  blurred = bicubic(bicubic(reference[:16, :20], 4, 5), 16, 20)
  np.testing.assert_array_equal(found["blurred_ref_image"], blurred)
  assert set(found) == set(ALL_IMAGES)


def test_training_pair_equals_published():
  """The reference is not cropped: 21 columns to 5, to 21 again, then zero-padded."""
  reference = noise(19, 21, seed=1)
  found = SuperResolutionPair(reference_side=24)(
    {"image": noise(24, 24), "reference": reference}, rng()
  )
  np.testing.assert_array_equal(found["ref_image"][:19, :21], reference)
  blurred = bicubic(bicubic(reference, 4, 5), 19, 21)
  np.testing.assert_array_equal(found["blurred_ref_image"][:19, :21], blurred)
  for key in REFERENCES:
    assert found[key].shape == (24, 24, 3)
    assert not found[key][19:].any()
    assert not found[key][:, 21:].any()


def test_resizes_equal_golden(load_golden):
  _, inputs, outputs = load_golden("ttsr_data_a")
  for i in range(3):
    image = inputs[f"pil_u8_{i}"]
    height, width = image.shape[:2]
    small = shrink(image)
    np.testing.assert_array_equal(small, outputs[f"pil_down4_{i}"])
    np.testing.assert_array_equal(enlarge(small, (height, width)), outputs[f"pil_up_{i}"])
    whole = (height // 4 * 4, width // 4 * 4)
    np.testing.assert_array_equal(enlarge(small, whole), outputs[f"pil_up4_{i}"])


def test_training_pair_equals_golden(load_golden):
  """Low-resolution, upsampled and reference images of the official training dataset."""
  _, inputs, outputs = load_golden("ttsr_fn_a")
  example = {"image": inputs["train_hr_u8"], "reference": inputs["train_ref_u8"]}
  found = SuperResolutionPair(reference_side=160)(example, rng())
  names = {"low_res_image": "LR", "upsampled_image": "LR_sr", "blurred_ref_image": "Ref_sr"}
  for ours, theirs in names.items():
    np.testing.assert_array_equal(found[ours], channels_last(outputs[f"train/{theirs}"]))


def channels_last(image):
  return np.moveaxis(image, 0, -1)


def test_stitched_references_padded():
  references = tuple(noise(6 + i, 9 - i, seed=i) for i in range(3))
  transform = SuperResolutionPair(stitch_side=12)
  found = transform({"image": noise(8, 8), "reference": references}, rng())["ref_image"]
  assert found.shape == (36, 12, 3)
  for i, reference in enumerate(references):
    square = found[12 * i : 12 * i + 12].copy()
    np.testing.assert_array_equal(square[: 6 + i, : 9 - i], reference)
    square[: 6 + i, : 9 - i] = 0
    assert not square.any()


def test_self_reference_is_low_res_image():
  image = noise(40, 56)
  found = SuperResolutionPair()({"image": image, "reference": None}, rng())
  small = bicubic(image, 10, 14)
  np.testing.assert_array_equal(found["ref_image"], small[:8, :12])
  np.testing.assert_array_equal(
    found["blurred_ref_image"], bicubic(bicubic(small[:8, :12], 2, 3), 8, 12)
  )


def test_small_reference_zero_padded():
  image, reference = noise(16, 20), noise(10, 30)
  for seed in range(4):
    found = RandomPairCrop(12, margin=4)({"image": image, "reference": reference}, rng(seed))
    assert found["image"].shape == (12, 12, 3)
    assert found["reference"].shape == (20, 20, 3)
    assert not found["reference"][10:].any()
    columns = np.lib.stride_tricks.sliding_window_view(reference, (10, 20, 3))[0, :, 0]
    assert any(np.array_equal(found["reference"][:10], columns[i]) for i in range(11))


def encode(image, orientation):
  exif, stream = Image.Exif(), io.BytesIO()
  exif[0x0112] = orientation
  Image.fromarray(image).save(stream, "png", exif=exif)
  return stream.getvalue()


def test_exif_orientation_applied():
  image, reference = noise(12, 20), noise(8, 16)
  lying = {"image": encode(np.rot90(image), 6), "reference": encode(reference, 1)}
  found = SuperResolutionPair()(lying, rng())
  np.testing.assert_array_equal(found["image"], image)
  np.testing.assert_array_equal(found["ref_image"], reference)
  both = {**lying, "reference": (encode(np.rot90(reference), 6),) * 2}
  stitched = SuperResolutionPair(stitch_side=16)(both, rng())["ref_image"]
  np.testing.assert_array_equal(stitched[16:24], reference)
  cropped = RandomPairCrop((12, 20))(lying, rng())
  np.testing.assert_array_equal(cropped["image"], image)


@pytest.mark.parametrize(
  ("transform", "example", "message"),
  [
    (SuperResolutionPair(), {"image": noise(3, 9), "reference": noise(8, 8)},
     "the image: 3x9"),
    (SuperResolutionPair(), {"image": noise(8, 8), "reference": noise(9, 2)},
     "reference: 9x2"),
    (SuperResolutionPair(), {"image": noise(8, 8)}, "reference: missing"),
    (SuperResolutionPair(8), {"image": noise(8, 8), "reference": noise(9, 8)},
     "reference_side: 8x8 .*9x8"),
    (SuperResolutionPair(stitch_side=8), {"image": noise(8, 8), "reference": (noise(4, 12),)},
     "stitch_side: 8x8 .*4x12"),
    (RandomPairCrop(12), {"image": noise(8, 16), "reference": noise(16, 16)},
     "size: 12x12 .*8x16"),
    (RandomPairTurn(), dict.fromkeys(ALL_IMAGES, noise(4, 8)),
     "low_res_image: 4x8 pixels"),
    (PadPair(8, 8), dict.fromkeys(ALL_IMAGES, noise(12, 8)),
     "image: 8x8 .*12x8"),
  ],
)  # fmt: skip
def test_invalid_example_raises(transform, example, message):
  with pytest.raises(ValueError, match=message):
    transform(example, rng())


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: SuperResolutionPair(reference_side=10), "reference_side is 10"),
    (lambda: SuperResolutionPair(stitch_side=0), "stitch_side is 0"),
    (lambda: RandomPairCrop(10), "size is 10"),
    (lambda: RandomPairCrop(8, margin=(0, 3)), "expected multiples of 2"),
    (lambda: PadPair(8, (8, 6)), "reference_size is .8, 6."),
  ],
)
def test_invalid_field_raises(make, message):
  with pytest.raises(ValueError, match=message):
    make()


# --- augmentation ---------------------------------------------------------------------------------


def numbered(side, seed):
  return np.arange(seed, seed + side * side * 3).reshape(side, side, 3) % 251


def orbit(image):
  turned = [np.rot90(image, k) for k in range(4)]
  return {x.tobytes() for t in turned for x in (t, t[::-1])}


def test_random_turn_all_orientations():
  example = {
    key: numbered(4 if key != "low_res_image" else 1, i) for i, key in enumerate(ALL_IMAGES)
  }
  image, reference = example["image"], example["ref_image"]
  seen = [RandomPairTurn()(example, rng(seed)) for seed in range(200)]
  assert {x["image"].tobytes() for x in seen} == orbit(image)
  assert {x["ref_image"].tobytes() for x in seen} == orbit(reference)
  pairs = {(x["image"].tobytes(), x["ref_image"].tobytes()) for x in seen}
  assert len(pairs) > 40  # of the 64 independent combinations
  for one in seen[:20]:  # the images of a group get the same turn
    np.testing.assert_array_equal(one["image"] + 0, (one["upsampled_image"] + 1) % 251)
    np.testing.assert_array_equal((one["ref_image"] + 1) % 251, one["blurred_ref_image"])


def test_random_turn_together():
  example = dict.fromkeys(ALL_IMAGES, noise(4, 8))
  for seed in range(8):
    turned = RandomPairTurn(rotate=False, together=True)(example, rng(seed))
    for key in ALL_IMAGES:
      np.testing.assert_array_equal(turned[key], turned["image"])
  assert len({turned_key(example, seed) for seed in range(30)}) == 4


def turned_key(example, seed):
  return RandomPairTurn(rotate=False, together=True)(example, rng(seed))["image"].tobytes()


def test_random_crops_aligned():
  rows, columns = np.mgrid[0:40, 0:60]
  image = np.stack([rows, columns, rows], axis=-1).astype(np.uint8)
  crop = RandomPairCrop((16, 20), margin=(0, 8))
  corners = set()
  for seed in range(50):
    found = crop({"image": image, "reference": image}, rng(seed))
    assert found["image"].shape == (16, 20, 3)
    assert found["reference"].shape == (16, 36, 3)
    (top, left, _), other = found["image"][0, 0].tolist(), found["reference"][0, 0].tolist()
    assert other[0] == top
    assert other[1] == min(max(left - 8, 0), 60 - 36)
    corners.add((top, left))
  assert {corner[0] for corner in corners} >= {0, 24}
  assert len(corners) > 30


def test_pad_pair_keeps_content():
  example = SuperResolutionPair()({"image": noise(8, 12), "reference": noise(4, 8)}, rng())
  found = PadPair((12, 16), 8)(example, rng())
  assert found["size"].tolist() == [8, 12]
  assert found["size"].dtype == np.int32
  for key, (height, width) in {
    "image": (12, 16), "upsampled_image": (12, 16), "low_res_image": (3, 4),
    "ref_image": (8, 8), "blurred_ref_image": (8, 8),
  }.items():  # fmt: skip
    original = example[key].shape
    assert found[key].shape == (height, width, 3)
    np.testing.assert_array_equal(found[key][: original[0], : original[1]], example[key])
    assert int(found[key].sum()) == int(example[key].sum())
