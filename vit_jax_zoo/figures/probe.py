"""Linear-probe accuracy over depth (iGPT's figure 2)."""

from collections.abc import Sequence

from matplotlib.figure import Figure

LINE, REFERENCE = "#0072B2", "#555555"


def draw_probe(
  accuracies: Sequence[float],
  best: int,
  references: Sequence[tuple[str, float]] = (),
  *,
  title: str = "Linear probe by depth",
) -> Figure:
  """Draws the accuracy of each layer's features.

  Args:
    accuracies: of the layers in order, in [0, 1].
    best: the layer selected on held-out images.
    references: names and accuracies of other features, drawn as horizontal lines.
    title: of the figure.
  """
  figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
  ax = figure.subplots()
  percent = [100 * value for value in accuracies]
  ax.plot(range(len(percent)), percent, color=LINE, marker="o", markersize=5, linewidth=1.8)
  ax.plot(best, percent[best], "o", color=LINE, markersize=11, fillstyle="none")
  note = f"layer {best}, chosen on validation: {percent[best]:.1f} %"
  place = best / max(len(percent) - 1, 1)
  side = "left" if place < 1 / 3 else "right" if place > 2 / 3 else "center"
  ax.annotate(note, (best, percent[best]), (0, 12), "data", "offset points", ha=side)
  for name, value in references:
    ax.axhline(100 * value, color=REFERENCE, linewidth=1.2, linestyle="--")
    ax.annotate(
      f"{name}: {100 * value:.1f} %", (1, 100 * value), (-4, 4), ("axes fraction", "data"),
      "offset points", ha="right", color=REFERENCE, fontsize=9,
    )  # fmt: skip
  ax.margins(y=0.25)
  ax.set_xlabel("layer (0: the first block's input; last: after the final norm)")
  ax.set_ylabel("test accuracy, %")
  ax.set_title(title, loc="left", weight="bold")
  ax.spines[["top", "right"]].set_visible(False)
  return figure
