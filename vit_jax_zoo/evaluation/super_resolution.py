"""Scores of enlarged pictures: TTSR's own, on luma, and scikit-image's, on colours."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Num
from skimage import metrics

from vit_jax_zoo.evaluation.base import MeanEvaluator
from vit_jax_zoo.ops.picture_quality import psnr_y, ssim_y

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
