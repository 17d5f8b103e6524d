"""The head of a figure: its title, and below it, more quietly, what it shows."""

from matplotlib.figure import Figure

QUIET = "#555555"
MARGIN = 0.3  # inches


def write_title(figure: Figure, title: str, subtitle: str) -> None:
  """Writes both at the upper left. They take 0.7 inches, which the figure must have to spare."""
  width, height = figure.get_size_inches()
  left = MARGIN / width
  figure.text(left, 1 - 0.16 / height, title, ha="left", va="top", fontsize=13, weight="bold")
  figure.text(left, 1 - 0.42 / height, subtitle, ha="left", va="top", fontsize=9.5, color=QUIET)
