import numpy as np
import pytest

from vit_jax_zoo.data.transforms import build_transforms


@pytest.mark.parametrize(("fraction", "length"), [(0.0, 0), (0.5, 4 * 6), (1.0, 7 * 6)])
def test_prefix_length_whole_rows(fraction, length):
  (transform,) = build_transforms([{"name": "keep_prefix", "fraction": fraction}])
  image = np.arange(7 * 6, dtype=np.uint8).reshape(7, 6, 1)
  example = transform({"image": image, "label": 3}, np.random.default_rng(0))
  assert example["prefix_length"] == length
  assert example["label"] == 3
  np.testing.assert_array_equal(example["image"], np.repeat(image, 3, axis=2))


def test_fraction_above_one_raises():
  with pytest.raises(ValueError, match=r"fraction is 2.0"):
    build_transforms([{"name": "keep_prefix", "fraction": 2.0}])
