import numpy as np
import pytest
from scipy import ndimage

from tests.conftest import golden_folder
from vit_jax_zoo.ops.resize import METHODS, resize_position_grid


def table(height, width, dim=3, seed=0):
  return np.random.default_rng(seed).normal(size=(height * width, dim)).astype(np.float32)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((7, 5), (5, 9)), ((3, 3), (1, 8))])
def test_linear_equals_scipy_zoom(old, new):
  """vision_transformer uses scipy.ndimage.zoom(order=1)."""
  positions = table(*old)
  zoom = (new[0] / old[0], new[1] / old[1], 1)
  expected = ndimage.zoom(positions.reshape(*old, -1), zoom, order=1).reshape(-1, 3)
  np.testing.assert_allclose(resize_position_grid(positions, old, new), expected, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(28, 14), (24, 42), (48, 24)])
def test_border_not_zeroed_as_in_scipy(old, new):
  positions = table(old, old) + 10
  resized = resize_position_grid(positions, (old, old), (new, new)).reshape(new, new, 3)
  source = positions.reshape(old, old, 3)
  np.testing.assert_allclose(resized[-1, -1], source[-1, -1], rtol=1e-6)
  zoomed = ndimage.zoom(source, (new / old, new / old, 1), order=1)
  if (zoomed[-1] == 0).all():  # the scipy bug; otherwise both agree
    zoomed, resized = zoomed[:-1, :-1], resized[:-1, :-1]
  np.testing.assert_allclose(resized, zoomed, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_constant_kept_axes_separable(method):
  ones = np.ones((12, 2), np.float32)
  np.testing.assert_allclose(resize_position_grid(ones, (3, 4), (7, 2), method), 1, rtol=1e-6)
  positions = table(3, 5)
  tall = resize_position_grid(positions, (3, 5), (6, 5), method)
  both = resize_position_grid(tall, (6, 5), (6, 9), method)
  at_once = resize_position_grid(positions, (3, 5), (6, 9), method)
  np.testing.assert_allclose(both, at_once, atol=1e-5)
  turned = positions.reshape(3, 5, 3).transpose(1, 0, 2).reshape(-1, 3)
  transposed = resize_position_grid(turned, (5, 3), (9, 6), method)
  np.testing.assert_allclose(
    at_once.reshape(6, 9, 3), transposed.reshape(9, 6, 3).transpose(1, 0, 2), atol=1e-6
  )


def test_same_grid_unchanged():
  positions = table(3, 4)
  assert resize_position_grid(positions, (3, 4), (3, 4)) is positions


def test_invalid_arguments_raise():
  with pytest.raises(ValueError, match="did you mean 'bicubic'"):
    resize_position_grid(table(2, 2), (2, 2), (3, 3), "bicubicc")
  with pytest.raises(ValueError, match="position table: 4 rows"):
    resize_position_grid(table(2, 2), (3, 2), (3, 3))


@pytest.mark.parametrize(
  ("method", "source"),
  [("linear", "timm"), ("bicubic_antialias", "timm"), ("bicubic", "hugging_face")],
)
def test_equals_timm_and_hugging_face(method, source):
  """4 x 4 tables that timm 1.0.31 and transformers 5.23 resized to 6 x 6."""
  tables = np.load(golden_folder("position_grid") / "tables.npz")
  given = resize_position_grid(tables[source], (4, 4), (6, 6), method)
  np.testing.assert_allclose(given, tables[method], atol=1e-6)
