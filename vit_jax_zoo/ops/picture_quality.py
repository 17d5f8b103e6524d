"""How close a picture is to the truth: PSNR and SSIM of luma, as TTSR's code computes them."""

import math

import cv2
import numpy as np
from jaxtyping import Float, Num

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
