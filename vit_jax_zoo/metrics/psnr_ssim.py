"""Scores of enlarged pictures: TTSR's own, on luma, and scikit-image's, on colours."""

import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Num
from skimage import metrics

from vit_jax_zoo.metrics.base import MeanEvaluator

# BT.601 luma of 8-bit RGB, as MATLAB's rgb2ycbcr has it; without its offset of 16.
_LUMA = np.array([65.738, 129.057, 25.064]) / 256.0

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr_y(image: Num[np.ndarray, "h w 3"], truth: Num[np.ndarray, "h w 3"]) -> float:
  """Returns the peak signal-to-noise ratio of luma in dB, as TTSR's code computes it.

  Luma spans 219 levels, but the peak is 255; no border is left out.

  Args:
    image: in [0, 255], whole numbers if it is to be as published.
    truth: the same.

  Returns:
    infinity for equal luma.
  """
  difference = (_double(image) - _double(truth)) / 255.0 @ _LUMA
  error = float(np.mean(difference**2))
  return -10 * math.log10(error) if error else math.inf


def ssim_y(image: Num[np.ndarray, "h w 3"], truth: Num[np.ndarray, "h w 3"]) -> float:
  """Returns the structural similarity of luma (Wang et al., 2004), as TTSR's code computes it.

  Windows are Gaussian, 11x11 with deviation 1.5, and only those inside of the picture count.

  Args:
    image: in [0, 255].
    truth: the same.

  Raises:
    ValueError: a side is below 11 pixels.
  """
  if min(truth.shape[:2]) < _WINDOW:
    raise ValueError(
      f"SSIM needs pictures of at least {_WINDOW}x{_WINDOW} pixels, but one is "
      f"{truth.shape[0]}x{truth.shape[1]}"
    )
  x, y = (_double(pixels) @ _LUMA + 16 for pixels in (image, truth))
  mean_x, mean_y = _blurred(x), _blurred(y)
  variance_x = _blurred(x**2) - mean_x**2
  variance_y = _blurred(y**2) - mean_y**2
  covariance = _blurred(x * y) - mean_x * mean_y
  luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
  structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
  return float(np.mean(luminance * structure))


def _blurred(x: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h2 w2"]:
  kernel = cv2.getGaussianKernel(_WINDOW, _SIGMA)
  margin = _WINDOW // 2
  return cv2.sepFilter2D(x, -1, kernel, kernel)[margin:-margin, margin:-margin]


def _double(x: Num[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
  return np.asarray(x, np.float64)


SCORES = ("psnr", "ssim", "skimage_psnr", "skimage_ssim")


def score(image: Num[np.ndarray, "h w 3"], truth: Num[np.ndarray, "h2 w2 3"]) -> dict[str, float]:
  """Returns `SCORES` of one picture: luma as TTSR has it, and all colours as scikit-image does.

  Args:
    image: in [0, 255].
    truth: the same. Both are cropped to the sides that they share, from the upper left.
  """
  height, width = (min(a, b) for a, b in zip(image.shape[:2], truth.shape[:2], strict=True))
  image, truth = image[:height, :width], truth[:height, :width]
  same = np.array_equal(image, truth)
  return {
    "psnr": psnr_y(image, truth),
    "ssim": ssim_y(image, truth),
    "skimage_psnr": math.inf
    if same
    else float(metrics.peak_signal_noise_ratio(truth, image, data_range=255)),
    "skimage_ssim": float(
      metrics.structural_similarity(truth, image, data_range=255, channel_axis=-1)
    ),
  }


class SuperResolutionEvaluator(MeanEvaluator):
  """Averages the scores of pictures, each of which weighs the same.

  Scores: `SCORES`; the same of the bicubic enlargements, as "bicubic_psnr", ...; "psnr_gain", by
  how much the results are better than those; "images". Where predictions were made with wrong
  references, too, their scores as "wrong_reference_psnr", ...; and "reference_gain", by how much
  the PSNR with the true ones is better.
  """

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Takes one batch.

    Args:
      batch: `image` [b H W 3], the truth, and `upsampled_image`, its bicubic rival, in [0, 255];
        `size` [b 2] and `mask` [b], both optional, as `tasks.super_resolution` has them.
      predictions: `image` [b H W 3] in [0, 255]; `wrong_reference_image`, the same with another
        picture's reference, optional.
    """
    truths = np.asarray(batch["image"])
    kept = np.asarray(batch.get("mask", np.ones(len(truths))), bool)
    sizes = np.asarray(batch.get("size", [truths.shape[1:3]] * len(truths)))
    for i in np.flatnonzero(kept):
      truth = truths[i, : sizes[i][0], : sizes[i][1]]
      rivals = {"": predictions["image"], "bicubic_": batch["upsampled_image"]}
      if "wrong_reference_image" in predictions:
        rivals["wrong_reference_"] = predictions["wrong_reference_image"]
      scores = {
        prefix + name: value
        for prefix, images in rivals.items()
        for name, value in score(np.asarray(images[i]), truth).items()
      }
      self.count(1, scores)

  def result(self) -> dict[str, float]:
    """Returns the scores by name; PSNR in dB."""
    means = self.means()
    gains = {"psnr_gain": means["psnr"] - means["bicubic_psnr"]}
    if "wrong_reference_psnr" in means:
      gains["reference_gain"] = means["psnr"] - means["wrong_reference_psnr"]
    return means | gains | {"images": float(self.images)}
