"""PSNR and SSIM of enlarged images: on luma as TTSR's code, and on RGB as scikit-image."""

import collections
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Num
from skimage import metrics

from vit_jax_zoo.metrics.base import Evaluator, real_rows

# BT.601 luma of 8-bit RGB, as in MATLAB's rgb2ycbcr, without its offset of 16.
_LUMA = np.array([65.738, 129.057, 25.064]) / 256.0

_WINDOW, _SKIMAGE_WINDOW = 11, 7


def psnr_y(image: Num[np.ndarray, "h w 3"], truth: Num[np.ndarray, "h w 3"]) -> float:
  """Returns PSNR of luma in dB as TTSR's code: pixels in [0, 255], 219 levels, a peak of 255."""
  difference = (np.asarray(image, np.float64) - np.asarray(truth, np.float64)) / 255.0 @ _LUMA
  error = float(np.mean(difference**2))
  return -10 * math.log10(error) if error else math.inf


def ssim_y(image: Num[np.ndarray, "h w 3"], truth: Num[np.ndarray, "h w 3"]) -> float:
  """Returns SSIM (Wang et al., 2004) of luma as TTSR's code, over Gaussian 11x11 windows."""
  if min(truth.shape[:2]) < _WINDOW:
    size = f"{truth.shape[0]}x{truth.shape[1]}"
    raise ValueError(f"truth: its size is {size}; SSIM needs at least {_WINDOW}x{_WINDOW} pixels")
  x, y = (np.asarray(pixels, np.float64) @ _LUMA + 16 for pixels in (image, truth))
  windows = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
  return float(metrics.structural_similarity(x, y, data_range=255, **windows))


SCORES = ("psnr", "ssim", "skimage_psnr", "skimage_ssim")


def score(image: Num[np.ndarray, "h w 3"], truth: Num[np.ndarray, "h2 w2 3"]) -> dict[str, float]:
  """Returns `SCORES`, cropped to shared sides; all are NaN if a pixel is not finite.

  An undefined score is infinite: PSNR if the images are equal, SSIM if they are too small.
  """
  if not np.isfinite(image).all():
    return dict.fromkeys(SCORES, math.nan)
  height, width = (min(a, b) for a, b in zip(image.shape[:2], truth.shape[:2], strict=True))
  image, truth = image[:height, :width], truth[:height, :width]
  side, found = min(height, width), dict.fromkeys(SCORES, math.inf)
  found["psnr"] = psnr_y(image, truth)
  if side >= _WINDOW:
    found["ssim"] = ssim_y(image, truth)
  if not np.array_equal(image, truth):
    found["skimage_psnr"] = metrics.peak_signal_noise_ratio(truth, image, data_range=255)
  if side >= _SKIMAGE_WINDOW:
    fields = {"data_range": 255, "channel_axis": -1}
    found["skimage_ssim"] = metrics.structural_similarity(truth, image, **fields)
  return {name: float(value) for name, value in found.items()}


class SuperResolutionEvaluator(Evaluator):
  """Means of the scores over images; batches and predictions are those of `SuperResolution`.

  An image of infinite PSNR (equal to its ground truth), or undefined SSIM (too small), is left out
  of that score's mean and counted in "<score>_excluded"; a score of which all are excluded is
  infinite for PSNR, and missing for others. Pixels that are not finite make a mean NaN. Scores:
  `SCORES`; "bicubic_psnr", ... of bicubic enlargements; "psnr_gain", the mean difference of the
  two; "images"; with predictions from wrong references also "wrong_reference_psnr", ... and
  "reference_gain".
  """

  scores = (
    *(prefix + name for prefix in ("", "bicubic_", "wrong_reference_") for name in SCORES),
    "psnr_gain", "reference_gain", "images",
  )  # fmt: skip

  def __init__(self) -> None:
    self.images = 0
    self.sums: collections.Counter[str] = collections.Counter()  # keeps scores of sum 0
    self.counts: collections.Counter[str] = collections.Counter()

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    truths = np.asarray(batch["image"])
    sizes = np.asarray(batch.get("size", [truths.shape[1:3]] * len(truths)))
    kinds = {"": predictions["image"], "bicubic_": batch["upsampled_image"]}
    if "wrong_reference_image" in predictions:
      kinds["wrong_reference_"] = predictions["wrong_reference_image"]
    for i in real_rows(batch, len(truths)):
      truth = truths[i, : sizes[i][0], : sizes[i][1]]
      found = {kind: score(np.asarray(images[i]), truth) for kind, images in kinds.items()}
      scores = {kind + name: value for kind in found for name, value in found[kind].items()}
      for gain, kind in (("psnr_gain", "bicubic_"), ("reference_gain", "wrong_reference_")):
        if kind in found:
          other = scores[f"{kind}psnr"]
          scores[gain] = other if math.isinf(other) else scores["psnr"] - other
      self.images += 1
      self.counts.update({name: not math.isinf(value) for name, value in scores.items()})
      self.sums.update({k: 0.0 if math.isinf(value) else value for k, value in scores.items()})

  def merge(self, other: Any) -> None:
    self.images += other.images
    self.sums.update(other.sums)
    self.counts.update(other.counts)

  def result(self) -> dict[str, float]:
    if not self.images:
      raise ValueError("no image was evaluated; is the evaluation split empty?")
    result = {"images": float(self.images)}
    for name, total in self.sums.items():
      count = self.counts[name]
      if count or name.endswith("psnr"):
        result[name] = total / count if count else math.inf
      if count < self.images:
        result[f"{name}_excluded"] = float(self.images - count)
    return result
