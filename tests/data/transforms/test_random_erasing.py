"""Random erasing: probability, area and fill modes."""

import numpy as np
import pytest

from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.data.transforms.augment import RandomErasing

BLACK = np.zeros((60, 80, 3), np.uint8)


def erased(transform, seed, image=BLACK):
  return transform.apply(image, np.random.default_rng(seed))


def test_probability_area_and_aspect_ratio():
  transform = RandomErasing(probability=0.3)
  changed, ratios = 0, []
  for seed in range(500):
    found = np.argwhere((erased(transform, seed) == 128).all(axis=2))
    if len(found):
      changed += 1
      height, width = np.ptp(found, axis=0) + 1
      assert len(found) == height * width
      assert 0.017 < len(found) / 4800 < 0.35  # of 0.02 to 1/3, rounded to pixels
      ratios.append(np.log(height / width))
  assert changed / 500 == pytest.approx(0.3, abs=0.07)
  assert -1.35 < min(ratios) < -0.9
  assert 0.9 < max(ratios) < 1.35
  assert not BLACK.any()


def test_deterministic_given_rng():
  transform = RandomErasing(probability=1.0, mode="pixel")
  np.testing.assert_array_equal(erased(transform, 1), erased(transform, 1))
  assert (erased(transform, 1) != erased(transform, 2)).any()


def test_fill_modes():
  fields = dict(probability=1.0, area=(0.3, 0.3), aspect_ratio=(1.0, 1.0))
  mean, std = (0.25, 0.5, 0.75), (0.02, 0.04, 0.02)
  const, rand, pixel = (
    erased(RandomErasing(**fields, mode=mode, image_mean=mean, image_std=std), 3)
    for mode in ("const", "rand", "pixel")
  )
  inside = const.any(axis=2)
  assert inside.sum() == 38 * 38
  assert (const[inside] == (64, 128, 191)).all()
  colours = np.unique(rand[rand.any(axis=2)], axis=0)
  assert len(colours) == 1
  assert 0 < np.abs(colours[0] - np.array([64, 128, 191])).max() < 40
  noise = pixel[pixel.any(axis=2)]
  np.testing.assert_allclose(noise.mean(axis=0), np.multiply(mean, 255), atol=1)
  np.testing.assert_allclose(noise.std(axis=0), np.multiply(std, 255), rtol=0.1)


def test_rectangle_too_large_not_erased():
  transform = RandomErasing(probability=1.0, area=(1.0, 1.0), aspect_ratio=(1.0, 1.0))
  np.testing.assert_array_equal(erased(transform, 0), BLACK)


def test_float_image_stays_float():
  transform = RandomErasing(probability=1.0, image_mean=0.3)
  result = erased(transform, 0, np.zeros((20, 20, 3), np.float32))
  assert result.dtype == np.float32
  assert result.max() == np.float32(76.5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mode": "pixels"}, "did you mean 'pixel'"),
    ({"probability": 1.1}, r"probability is 1.1"),
    ({"area": (0.5, 0.2)}, r"area is \(0.5, 0.2\)"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    build_transforms([{"name": "random_erasing", **fields}])
