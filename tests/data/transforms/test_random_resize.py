import numpy as np
import pytest

from vit_jax_zoo.data.transforms import build_transforms


def test_shorter_side_in_range_aspect_ratio_kept():
  (transform,) = build_transforms([{"name": "random_resize_small", "smallest": 10, "largest": 13}])
  image = np.random.default_rng(0).integers(0, 256, (40, 20, 3), dtype=np.uint8)
  rng = np.random.default_rng(1)
  shapes = {transform({"image": image}, rng)["image"].shape for _ in range(60)}
  assert shapes == {(2 * side, side, 3) for side in (10, 11, 12, 13)}


@pytest.mark.parametrize(("smallest", "largest"), [(0, 5), (6, 5)])
def test_invalid_range_raises(smallest, largest):
  with pytest.raises(ValueError, match=rf"smallest is {smallest}; expected .*{largest}"):
    build_transforms([{"name": "random_resize_small", "smallest": smallest, "largest": largest}])


def test_translate_reflect_padding():
  (transform,) = build_transforms([{"name": "random_translate", "pixels": 2, "fill": None}])
  image = np.arange(25, dtype=np.uint8).reshape(5, 5, 1).repeat(3, axis=2)
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
  windows = {padded[i : i + 5, j : j + 5].tobytes() for i in range(5) for j in range(5)}
  rng = np.random.default_rng(0)
  seen = {transform({"image": image}, rng)["image"].tobytes() for _ in range(200)}
  assert len(seen) > 20
  assert seen <= windows
