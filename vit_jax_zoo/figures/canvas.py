"""The head of a figure: its title, and below it, more quietly, what it shows."""

import warnings

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def render(figure: Figure) -> UInt8[np.ndarray, "h w 3"]:
  """Draws a figure, and takes its words as they stand.

  Class names are those of users' folders: a "$" begins no formula there, and where the font lacks a
  character, a box in its place is all that is said of it.
  """
  canvas = FigureCanvasAgg(figure)
  for text in figure.findobj(Text):
    if isinstance(text, Text):
      text.set_parse_math(False)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
    canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


QUIET = "#555555"
MARGIN = 0.3  # inches


def write_title(figure: Figure, title: str, subtitle: str) -> None:
  """Writes both at the upper left. They take 0.7 inches, which the figure must have to spare."""
  width, height = figure.get_size_inches()
  left = MARGIN / width
  figure.text(left, 1 - 0.16 / height, title, ha="left", va="top", fontsize=13, weight="bold")
  figure.text(left, 1 - 0.42 / height, subtitle, ha="left", va="top", fontsize=9.5, color=QUIET)
