"""Small photographs. Worker processes import this module; conftest.py's libraries take seconds."""

import io

import numpy as np
from PIL import Image


def photo(height=40, width=60, seed=0):
  """Returns a smooth colour image that JPEG compresses with little loss."""
  phase = np.random.default_rng(seed).uniform(0, 6, 3)
  y, x = np.mgrid[:height, :width]
  waves = np.sin(x[..., None] / 9 + phase) + np.cos(y[..., None] / 7 + phase)
  return np.round(127.5 + 60 * waves).astype(np.uint8)


def encode(image, image_format="JPEG", **options):
  buffer = io.BytesIO()
  if not isinstance(image, Image.Image):
    image = Image.fromarray(image)
  image.save(buffer, image_format, **options)
  return buffer.getvalue()
