"""Bar chart of the number of examples per class, by split."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Integer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_jax_zoo.errors import shorten
from vit_jax_zoo.figures.canvas import QUIET

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
"""Colours of the splits in order, from Okabe and Ito's palette, safe for colour blindness."""

MAX_NAMED = 40
"""More classes are sorted by size and not named."""


def draw_class_balance(
  counts: Mapping[str, Integer[np.ndarray, " k"]],
  class_names: Sequence[str] = (),
  *,
  title: str = "Examples of each class",
) -> Figure:
  """Draws a bar for each class, with a segment per split.

  Args:
    counts: examples of each class, by split; the training split first.
    class_names: in order; class numbers by default.
    title: of the figure.

  Raises:
    ValueError: there is no split.
  """
  if not counts:
    raise ValueError("counts: no split to draw; expected at least one")
  first = np.asarray(next(iter(counts.values())))
  named = len(first) <= MAX_NAMED
  order = np.arange(len(first)) if named else np.argsort(-first, kind="stable")
  height = float(np.clip(0.27 * len(first), 0.7, 9.0)) if named else 5.0
  figure = Figure(figsize=(7.2, height + 1.5), dpi=110, layout="constrained")
  ax = figure.subplots()
  _draw_bars(ax, counts, order)
  if named:
    _name_classes(ax, counts, class_names)
  else:
    ax.set_yticks([])
    ax.set_ylabel(f"{len(first)} classes, the largest first", fontsize=9)
  ax.set_ylim(len(first) - 0.4, -0.6)
  ax.spines[["top", "right", "left"]].set_visible(False)
  ax.tick_params(labelsize=8.5, length=0)
  ax.set_xlabel("examples", fontsize=9)
  smallest, largest = int(first.min()), int(first.max())
  split = next(iter(counts))
  sizes = f"{smallest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
  figure.suptitle(title, x=0.02, ha="left", fontsize=13, weight="bold")
  ax.set_title(
    f"{split}: {int(first.sum()):,} in {len(first)} classes, {sizes} each",
    loc="left", fontsize=9.5, color=QUIET,
  )  # fmt: skip
  if len(counts) > 1:
    ax.legend(
      loc="lower right", bbox_to_anchor=(1, 1), ncols=len(counts), fontsize=8.5, frameon=False
    )
  return figure


def _draw_bars(
  ax: Axes, counts: Mapping[str, Integer[np.ndarray, " k"]], order: Integer[np.ndarray, " k"]
) -> None:
  places = np.arange(len(order))
  left = np.zeros(len(order))
  for i, (split, values) in enumerate(counts.items()):
    widths = np.asarray(values)[order]
    color = COLORS[i % len(COLORS)]
    if len(order) <= MAX_NAMED:
      ax.barh(places, widths, left=left, height=0.72, color=color, label=split)
    else:  # thousands of bars would take minutes
      ax.fill_betweenx(
        places, left, left + widths, step="mid", color=color, linewidth=0, label=split
      )
    left = left + widths


def _name_classes(
  ax: Axes, counts: Mapping[str, Integer[np.ndarray, " k"]], class_names: Sequence[str]
) -> None:
  total = np.sum([np.asarray(values) for values in counts.values()], axis=0)
  names = [class_names[i] if class_names else str(i) for i in range(len(total))]
  ax.set_yticks(range(len(total)), [shorten(name, 24) for name in names])
  for place, count in enumerate(total):
    ax.annotate(
      f"{int(count):,}", (count, place), (4, 0), textcoords="offset points", va="center",
      fontsize=8, color=QUIET,
    )  # fmt: skip
  ax.margins(x=0.1)
