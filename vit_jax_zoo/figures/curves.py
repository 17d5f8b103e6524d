"""Metric curves over training steps or examples, of one run or several."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_metrics(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
  """Draws metrics of a run side by side over the steps.

  Args:
    rows: as `metric_writer.read_metrics` returns them.
    names: metrics without the prefix: "loss" draws "train/loss" and "test/loss" together.

  Raises:
    ValueError: no row has one of them.
  """
  figure = Figure(figsize=(4.0 * len(names) + 0.4, 2.8), dpi=80, layout="constrained")
  for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
    parts = sorted({key for row in rows for key in row if key.partition("/")[2] == name})
    if not parts:
      raise ValueError(f"no metric {name!r} in the run")
    for part, color in zip(reversed(parts), COLORS, strict=False):
      points = [(row["step"], row[part]) for row in rows if part in row]
      label = part.partition("/")[0]
      ax.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=label)
    ax.set(xlabel="step", title=name.replace("_", " "))
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
  return figure
