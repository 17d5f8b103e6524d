import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from vit_jax_zoo.systems.ttsr.psnr_ssim import psnr_y, ssim_y


def pixels(images):
  """Rounds like the official code; crops both to their common size."""
  whole = [np.round((image[0].transpose(1, 2, 0) + 1) * 127.5) for image in images]
  height, width = (min(image.shape[axis] for image in whole) for axis in (0, 1))
  return [image[:height, :width] for image in whole]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_official_metrics_golden(load_golden, index):
  _, inputs, outputs = load_golden("ttsr_fn_a")
  image, truth = pixels([inputs[f"metric_{name}_{index}"] for name in ("sr", "hr")])
  np.testing.assert_allclose(psnr_y(image, truth), outputs[f"metric_psnr_{index}"][0], rtol=1e-7)
  np.testing.assert_allclose(ssim_y(image, truth), outputs[f"metric_ssim_{index}"][0], rtol=1e-7)


def test_ssim_equals_scikit_image_on_luma():
  rng = np.random.default_rng(0)
  truth = rng.integers(0, 256, (24, 30, 3)).astype(np.float64)
  image = np.clip(truth + rng.normal(scale=20, size=truth.shape), 0, 255)
  luma = [x @ np.array([65.738, 129.057, 25.064]) / 256 + 16 for x in (image, truth)]
  theirs = structural_similarity(
    *luma, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
  )
  np.testing.assert_allclose(ssim_y(image, truth), theirs, rtol=1e-6)


def test_equal_images():
  image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
  assert psnr_y(image, image) == math.inf
  assert ssim_y(image, image) == pytest.approx(1)


def test_small_image_ssim_raises():
  with pytest.raises(ValueError, match=r"truth: .*10x20"):
    ssim_y(np.zeros((10, 20, 3)), np.zeros((10, 20, 3)))
