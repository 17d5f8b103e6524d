"""Videos and cameras, by OpenCV: reads frames, and draws results over them."""

import pathlib
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
import PIL.Image
from PIL import ImageColor, ImageDraw, ImageFont

from vit_jax_zoo.figures.detection import COLORS, DARK
from vit_jax_zoo.inference.base import Image, Result

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def is_video(source: str) -> bool:
  """Whether a source is a video file, by its suffix, or a camera's number."""
  path = pathlib.Path(source)
  return path.suffix.lower() in SUFFIXES or (source.isdecimal() and not path.exists())


def open_video(source: str) -> tuple[Iterator[Image], float, int | None]:
  """Returns RGB frames, frames per second, and the number of frames if known; else ValueError."""
  capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
  if not capture.isOpened():
    raise ValueError(f"--images={source}: OpenCV cannot open it; expected a video or a camera")
  count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))

  def frames() -> Iterator[Image]:
    while (found := capture.read())[0]:
      yield cv2.cvtColor(found[1], cv2.COLOR_BGR2RGB)

  return frames(), capture.get(cv2.CAP_PROP_FPS) or 25.0, count if count > 0 else None


def annotate(frame: Image, result: Result) -> np.ndarray:
  """Returns the frame with its objects or most probable classes, else the result's picture."""
  if result.boxes is None and (result.mask is not None or not result.labels):
    return np.asarray(result.draw())
  colors = [COLORS[zlib.crc32(label.encode()) % len(COLORS)] for label in result.labels]
  frame, size = frame.copy(), max(11, len(frame) // 30)
  for mask, color in zip(() if result.masks is None else result.masks, colors, strict=False):
    frame[mask] = (frame[mask] + np.array(ImageColor.getrgb(color))) // 2
  picture, font, line = PIL.Image.fromarray(frame), ImageFont.load_default(size), 4 * size // 3
  draw = ImageDraw.Draw(picture)
  corners = [(0, line * i) for i in range(max(1, len(frame) // (3 * line)))]  # of classes
  if result.boxes is not None:
    corners = [(left, max(0, top - size)) for left, top, *_ in result.boxes.tolist()]
    for box, color in zip(result.boxes.tolist(), colors, strict=True):
      draw.rectangle(box, outline=color, width=max(2, size // 6))
  for corner, color, *found in zip(corners, colors, result.labels, result.scores, strict=False):
    text = "{} {:.0%}".format(*found)
    draw.rectangle(draw.textbbox(corner, text, font=font), fill=color)
    draw.text(corner, text, fill="white" if color in DARK else "black", font=font)
  return np.asarray(picture)
