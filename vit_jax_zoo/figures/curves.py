"""Figures of metrics over steps, of probes by depth, and of accuracies by dataset and shots."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vit_jax_zoo.figures.canvas import COLORS, QUIET, chart

GRID = "#E2E2E2"


def draw_metrics(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
  """Draws metrics, of `metric_writer.read_metrics`, over the steps; "loss" draws all splits'."""
  figure = Figure(figsize=(4.0 * len(names) + 0.4, 2.8), dpi=80, layout="constrained")
  for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
    parts = sorted({key for row in rows for key in row if key.partition("/")[2] == name})
    if not parts:
      raise ValueError(f"metric {name!r}: not in the run")
    for part, color in zip(reversed(parts), COLORS, strict=False):
      points = [(row["step"], row[part]) for row in rows if part in row]
      label = part.partition("/")[0]
      ax.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=label)
    ax.set(xlabel="step", title=name.replace("_", " "))
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
  return figure


def draw_probe(
  accuracies: Sequence[float], best: int, references: Sequence[tuple[str, float]], title: str
) -> Figure:
  """Draws the accuracies, in [0, 1], of the layers' features, and of others as horizontal lines."""
  depth = "layer (0: the first block's input; last: after the final norm)"
  figure, ax = chart((6.4, 4.0), title, depth, "test accuracy, %")
  percent = [100 * value for value in accuracies]
  ax.plot(range(len(percent)), percent, color=COLORS[0], marker="o", markersize=5, linewidth=1.8)
  ax.plot(best, percent[best], "o", color=COLORS[0], markersize=11, fillstyle="none")
  note = f"layer {best}, selected on validation: {percent[best]:.1f} %"
  position = best / max(len(percent) - 1, 1)
  side = "left" if position < 1 / 3 else "right" if position > 2 / 3 else "center"
  ax.annotate(note, (best, percent[best]), (0, 12), "data", "offset points", ha=side)
  style = {"textcoords": "offset points", "ha": "right", "color": QUIET, "fontsize": 9}
  for name, value in references:
    at, label = 100 * value, f"{name}: {100 * value:.1f} %"
    ax.axhline(at, color=QUIET, linewidth=1.2, linestyle="--")
    ax.annotate(label, (1, at), (-4, 4), ("axes fraction", "data"), **style)
  ax.margins(y=0.25)
  return figure


def draw_accuracies(
  accuracies: Mapping[str, float], title: str, groups: Mapping[str, str], means: Mapping[str, float]
) -> Figure:
  """Draws a bar for each dataset, coloured by its group, if any; accuracies are in [0, 1]."""
  names = list(accuracies)
  overall = f", mean {100 * means['mean']:.1f} %" if "mean" in means else ""
  size = (7.4, 1.3 + 0.34 * max(len(names), 2))
  figure, ax = chart(size, f"{title}{overall}", "test accuracy, %", "")
  kinds = list(dict.fromkeys(groups.values()))
  colors = [COLORS[kinds.index(groups[name])] if groups else COLORS[0] for name in names]
  percent = [100 * accuracies[name] for name in names]
  bars = ax.barh(range(len(names)), percent, color=colors, height=0.72)
  ax.bar_label(bars, [f"{value:.1f}" for value in percent], padding=4, fontsize=9)
  labels = [name if len(name) <= 40 else f"…{name[-39:]}" for name in names]  # the end of a path
  ax.set_yticks(range(len(names)), labels)
  ax.set_ylim(max(len(names), 2) - 0.4, -0.6)  # from the top; a single bar is not thicker
  ax.set_xlim(0, 108)
  if kinds:
    labels = [f"{kind} {100 * means[kind]:.1f}" if kind in means else kind for kind in kinds]
    handles = [Patch(color=COLORS[i]) for i in range(len(kinds))]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(kinds), frameon=False)
  ax.grid(axis="x", color=GRID, linewidth=0.8)
  return figure


def draw_shots(
  curves: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]], *, title: str
) -> Figure:
  """Draws each dataset's accuracies in [0, 1], with standard deviations, over numbers of shots."""
  figure, ax = chart((7.4, 4.4), title, "training images per class", "test accuracy, %")
  for i, (name, (shots, means, deviations)) in enumerate(curves.items()):
    color = COLORS[i % len(COLORS)]
    mean, std = 100 * np.asarray(means), 100 * np.asarray(deviations)
    ax.plot(shots, mean, color=color, marker="o", markersize=5, linewidth=1.8, label=name)
    low, high = np.clip([mean - std, mean + std], 0, 100)
    ax.fill_between(shots, low, high, color=color, alpha=0.15, linewidth=0)
    for at, value in zip(shots, mean, strict=True) if len(curves) == 1 else ():
      position = ((at, value), (0, 7), "data", "offset points")
      ax.annotate(f"{value:.1f}", *position, ha="center", fontsize=9)
  ticks = sorted({shot for shots, _, _ in curves.values() for shot in shots})
  ax.set_xscale("log")
  ax.set_xticks(ticks, [str(tick) for tick in ticks])
  ax.minorticks_off()
  ax.margins(x=0.08, y=0.15)
  bottom, top = ax.get_ylim()
  ax.set_ylim(max(bottom, -2), min(top, 107))
  if len(curves) > 1:
    ax.legend(frameon=False, fontsize=9)
  ax.grid(axis="y", color=GRID, linewidth=0.8)
  return figure
