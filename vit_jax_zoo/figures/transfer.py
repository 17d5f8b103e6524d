"""Figures of transfer evaluations: accuracy by dataset, and by number of shots."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLORS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, safe for colour blindness."""

GRID = "#E2E2E2"


def draw_accuracies(
  accuracies: Mapping[str, float],
  *,
  title: str,
  groups: Mapping[str, str] | None = None,
  means: Mapping[str, float] | None = None,
) -> Figure:
  """Draws a labelled bar for each dataset.

  Args:
    accuracies: in [0, 1] by name, in the order of the bars from the top.
    title: of the figure.
    groups: of the datasets, by name; a group has one colour and a legend entry.
    means: of groups, by name, for the legend; "mean" is added to the title.
  """
  means = means or {}
  names = list(accuracies)
  figure = Figure(figsize=(7.4, 1.3 + 0.34 * max(len(names), 2)), dpi=110, layout="constrained")
  ax = figure.subplots()
  kinds = list(dict.fromkeys((groups or {}).values()))
  colors = [COLORS[kinds.index(groups[name])] if groups else COLORS[0] for name in names]
  percent = [100 * accuracies[name] for name in names]
  bars = ax.barh(range(len(names)), percent, color=colors, height=0.72)
  ax.bar_label(bars, [f"{value:.1f}" for value in percent], padding=4, fontsize=9)
  ax.set_yticks(range(len(names)), names)
  ax.set_ylim(max(len(names), 2) - 0.4, -0.6)  # from the top; a single bar is not thicker
  ax.set_xlim(0, 108)
  ax.set_xlabel("test accuracy, %")
  overall = f", mean {100 * means['mean']:.1f} %" if "mean" in means else ""
  ax.set_title(f"{title}{overall}", loc="left", weight="bold")
  if kinds:
    labels = [f"{kind} {100 * means[kind]:.1f}" if kind in means else kind for kind in kinds]
    handles = [Patch(color=COLORS[i]) for i in range(len(kinds))]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(kinds), frameon=False)
  _clean(ax, "x")
  return figure


def draw_shots(
  curves: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]], *, title: str
) -> Figure:
  """Draws accuracy over the number of training images per class.

  Args:
    curves: by dataset: numbers of shots, accuracies in [0, 1], and their standard deviations
      over the samples of images.
    title: of the figure.
  """
  figure = Figure(figsize=(7.4, 4.4), dpi=110, layout="constrained")
  ax = figure.subplots()
  ticks: set[int] = set()
  for i, (name, (shots, means, deviations)) in enumerate(curves.items()):
    color = COLORS[i % len(COLORS)]
    mean, std = 100 * np.asarray(means), 100 * np.asarray(deviations)
    ax.plot(shots, mean, color=color, marker="o", markersize=5, linewidth=1.8, label=name)
    low, high = np.clip([mean - std, mean + std], 0, 100)
    ax.fill_between(shots, low, high, color=color, alpha=0.15, linewidth=0)
    for at, value in zip(shots, mean, strict=True):
      if len(curves) == 1:
        ax.annotate(
          f"{value:.1f}", (at, value), (0, 7), "data", "offset points", ha="center", fontsize=9
        )
    ticks |= set(shots)
  ax.set_xscale("log")
  ax.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
  ax.minorticks_off()
  ax.margins(x=0.08, y=0.15)
  bottom, top = ax.get_ylim()
  ax.set_ylim(max(bottom, -2), min(top, 107))
  ax.set_xlabel("training images per class")
  ax.set_ylabel("test accuracy, %")
  ax.set_title(title, loc="left", weight="bold")
  if len(curves) > 1:
    ax.legend(frameon=False, fontsize=9)
  _clean(ax, "y")
  return figure


def _clean(ax: Axes, axis: Literal["x", "y"]) -> None:
  ax.spines[["top", "right"]].set_visible(False)
  ax.grid(axis=axis, color=GRID, linewidth=0.8)
  ax.set_axisbelow(True)
