"""Figure of position lambdas: the norm at each position, by layer."""

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Num
from matplotlib.figure import Figure

from vit_jax_zoo.figures.canvas import (
  MARGIN,
  add_axes,
  add_color_bar,
  heat_map,
  show_image,
  write_title,
)  # fmt: skip

MAX_LAYERS = 6


def draw_lambdas(
  image: Num[np.ndarray, "h w c"], lambdas: Mapping[str, Float[np.ndarray, "h2 w2"]]
) -> Figure:
  """Draws an image in [0, 255], and over it the Frobenius norm of each position's lambda by layer.

  Layers ("c4_block10") are in the order of the numbers in their names; the last six are drawn.
  """
  numbers = {name: [int(digits) for digits in re.findall(r"\d+", name)] for name in lambdas}
  shown = sorted(lambdas, key=numbers.__getitem__)[-MAX_LAYERS:]
  height, width = image.shape[:2]
  cell = float(np.clip(width / 110, 1.7, 2.6))
  sides = (cell, cell * float(np.clip(height / width, 0.4, 1.6)))
  across = (len(shown) + 1) * (cell + 0.12)
  figure = Figure(figsize=(max(across + MARGIN + 1.0, 5.2), sides[1] + 1.15), dpi=110)
  write_title(figure, "Position lambdas", "norm of each position's lambda, over the image")
  axes = [add_axes(figure, MARGIN + i * (cell + 0.12), 0.4, *sides) for i in range(len(shown) + 1)]
  show_image(axes[0], image)
  for ax, name in zip(axes[1:], shown, strict=True):
    norms = lambdas[name]
    lowest, highest = float(norms.min()), float(norms.max())
    show_image(ax, heat_map(image, (norms - lowest) / max(highest - lowest, 1e-12)))
    rows, columns = norms.shape
    text = f"{name.replace('_', ' ')}, {rows} × {columns}"
    ax.set_xlabel(f"{text}\n{lowest:.3g} to {highest:.3g}", fontsize=8, labelpad=4)
  bar = add_axes(figure, MARGIN + across, 0.4, 0.12, sides[1])
  add_color_bar(figure, "norm", ("lowest", "highest"), cax=bar)
  return figure
