"""Figure of position lambdas: the norm at each position, by layer."""

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Num
from matplotlib.figure import Figure

from vit_jax_zoo.figures.canvas import hide_frame, show_image, write_title

MAX_LAYERS = 6


def draw_lambdas(
  image: Num[np.ndarray, "h w c"],
  lambdas: Mapping[str, Float[np.ndarray, "h2 w2"]],
) -> Figure:
  """Draws an image in [0, 255] and the Frobenius norm of each position's lambda by layer.

  Layers ("c4_block10") are in the order of the numbers in their names; the last six are drawn.
  """
  numbers = {name: [int(digits) for digits in re.findall(r"\d+", name)] for name in lambdas}
  shown = sorted(lambdas, key=numbers.__getitem__)[-MAX_LAYERS:]
  figure = Figure(figsize=(max(1.75 * (len(shown) + 1) + 0.5, 4.5), 2.75), dpi=110)
  axes = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
  figure.subplots_adjust(left=0.03, right=0.97, top=0.66, bottom=0.1, wspace=0.1)
  subtitle = "norm of each position's lambda, scaled to each layer's range"
  write_title(figure, "Position lambdas", subtitle)
  show_image(axes[0], image)
  for ax, name in zip(axes[1:], shown, strict=True):
    height, width = lambdas[name].shape
    ax.imshow(lambdas[name], cmap="viridis", interpolation="nearest")
    hide_frame(ax)
    ax.set_xlabel(f"{name.replace('_', ' ')}, {height} × {width}", fontsize=8, labelpad=4)
  return figure
