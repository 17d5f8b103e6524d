"""Draws docs/six.png and its parts docs/systems/*.png from runs of the six demos.

    for system in vit igpt lambda_resnet detr ttsr fpt; do
      python -m vit_jax_zoo.main --config=configs/$system.py
    done
    python docs/make_pictures.py

Runs are loaded as by `predict` and applied to test images. `--run=fpt=runs/fpt_demo_mask` takes
another run, here one with masks, or a PNG of a run's `figures`, which is drawn unchanged. In place
of a missing run, the picture has the command that trains it.
"""

import argparse
import dataclasses
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms.super_resolution import enlarge, shrink
from vit_jax_zoo.figures.canvas import heat_map
from vit_jax_zoo.figures.detection import COLORS
from vit_jax_zoo.inference.base import Options, Trained, create_predictor
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.systems.rcnn.masks import paste_masks
from vit_jax_zoo.systems.ttsr.psnr_ssim import psnr_y

COLUMNS = 6
TILE, GAP = 0.92, 0.07  # inches
LEFT, RIGHT, BETWEEN = 0.95, 0.3, 0.45  # width of the row labels; right margin; between panels
HEAD, CAPTION, BELOW = 0.82, 0.22, 0.12  # height of the headings; of captions; below a panel
QUIET = "#5b6067"


@dataclasses.dataclass(frozen=True)
class Tile:
  """An image of the grid.

  Attributes:
    pixels: uint8 [h w 3].
    caption: text below it.
    boxes: (left, top, right, bottom) in pixels, and a color.
  """

  pixels: np.ndarray
  caption: str = ""
  boxes: Sequence[tuple[np.ndarray, str]] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
  """The panel of one system.

  Attributes:
    system: name of the system.
    subtitle: the task, in one line.
    run: folder of the demo's run.
    command: command that trains it.
    rows: labels of the two rows.
    tiles: function of the run's folder that returns two rows of `COLUMNS` tiles.
  """

  system: str
  subtitle: str
  run: str
  command: str
  rows: tuple[str, str]
  tiles: Callable[[str], list[list[Tile]]]


def examples(source: str, indices: Sequence[int]) -> list[dict[str, Any]]:
  """Returns test examples with their images decoded, uint8 [h w 3]."""
  test = load_source(source, "test")
  decoded = []
  for index in indices:
    example = dict(test[index])
    for key in ("image", "reference"):
      if key in example:
        with Image.open(io.BytesIO(example[key])) as opened:
          example[key] = np.array(opened.convert("RGB"))
    decoded.append(example)
  return decoded


def compute(function: Callable[..., Any], variables: Any, batch: dict[str, np.ndarray]) -> Any:
  """Returns the numpy arrays that a task's jitted function computes for a batch."""
  return jax.device_get(jax.jit(function)(variables, batch))


def explain_digits(run: str) -> tuple[list[Tile], dict[str, np.ndarray]]:
  """Returns six test digits with a classifier's predictions, and the model's explanation."""
  trained = load(run)
  digits = examples("demo:digits", [40, 80, 115, 190, 260, 330])
  images = np.stack([np.asarray(trained.prepare(digit["image"])["image"]) for digit in digits])
  found = compute(trained.task.explain, trained.variables, {"image": images})
  tiles = []
  for image, label, digit in zip(found["image"], found["label"], digits, strict=True):
    caption = str(label) if label == digit["label"] else f"{label} (truth {digit['label']})"
    tiles.append(Tile(np.rint(image).astype(np.uint8), caption))
  return tiles, found["explanation"]


def vit(run: str) -> list[list[Tile]]:
  """Digits with predictions; attention rollout over the digits."""
  digits, explanation = explain_digits(run)
  maps = [
    heat_map(x.pixels, a / a.max()) for x, a in zip(digits, explanation["rollout"], strict=True)
  ]
  return [digits, [Tile(pixels) for pixels in maps]]


def lambda_resnet(run: str) -> list[list[Tile]]:
  """Digits with predictions; norms of the position lambdas of the last layer on the finest map."""
  digits, explanation = explain_digits(run)
  lambdas = explanation["lambdas"]
  norms = lambdas[max(lambdas, key=lambda name: (lambdas[name].size, name))]
  scaled = [(x - x.min()) / max(float(x.max() - x.min()), 1e-9) for x in norms]
  maps = [heat_map(digit.pixels, x) for digit, x in zip(digits, scaled, strict=True)]
  return [digits, [Tile(pixels) for pixels in maps]]


def igpt(run: str) -> list[list[Tile]]:
  """Upper halves of two digits, four sampled completions of each, the originals."""
  predictor = create_predictor(load(run), Options(samples=4, seed=1))
  return [_completions(predictor, digit["image"]) for digit in examples("demo:digits", [46, 298])]


def _completions(predictor: Any, image: np.ndarray) -> list[Tile]:
  strip = predictor(image).pictures["samples"]
  side = strip.shape[0]
  gap = (strip.shape[1] - COLUMNS * side) // (COLUMNS - 1)
  cells = [strip[:, i * (side + gap) : i * (side + gap) + side] for i in range(COLUMNS)]
  return [Tile(cell, name) for cell, name in zip(cells, ("prefix", *["sample"] * 4, "original"))]  # noqa: B905


def _detect(trained: Trained, task: Any, indices: Sequence[int]) -> list[tuple[Any, ...]]:
  """Returns test scenes, each with its predictions."""
  results = []
  for scene in examples("demo:scenes", indices):
    image = scene["image"]
    batch = {
      "image": np.asarray(trained.prepare(image)["image"])[None],
      "original_size": np.array([image.shape[:2]], np.int32),
    }
    found = compute(task.predict, trained.variables, batch)
    results.append((image, {key: value[0] for key, value in found.items()}))
  return results


def _confident(found: dict[str, np.ndarray], threshold: float = 0.7) -> np.ndarray:
  return np.flatnonzero(found["is_object"] & (found["scores"] >= threshold))


def _boxes(found: dict[str, np.ndarray], rows: np.ndarray) -> list[tuple[np.ndarray, str]]:
  boxes, labels = found["boxes_xyxy"][rows], found["labels"][rows]
  return [(box, COLORS[i % len(COLORS)]) for box, i in zip(boxes, labels, strict=True)]


def _names(found: dict[str, np.ndarray], rows: np.ndarray, names: Sequence[str]) -> str:
  left_to_right = rows[np.argsort(found["boxes_xyxy"][rows][:, 0], kind="stable")]
  return " ".join(names[int(label)] for label in found["labels"][left_to_right])


def detr(run: str) -> list[list[Tile]]:
  """Scenes with detections; attention of the query with the highest score."""
  trained = load(run)
  task = dataclasses.replace(trained.task, draw_attention=True)  # type: ignore[type-var]
  rows: list[list[Tile]] = [[], []]
  for image, found in _detect(trained, task, range(2, 2 + COLUMNS)):
    confident = _confident(found)
    names = _names(found, confident, trained.task.class_names)
    rows[0].append(Tile(image, names, _boxes(found, confident)))
    best = np.argmax(found["scores"], keepdims=True)
    attention = found["attention"][best[0]]
    rows[1].append(Tile(heat_map(image, attention / attention.max()), "", _boxes(found, best)))
  return rows


def fpt(run: str) -> list[list[Tile]]:
  """Scenes; detections, with their masks if the run has them."""
  trained = load(run)
  rows: list[list[Tile]] = [[], []]
  for image, found in _detect(trained, trained.task, range(8, 8 + COLUMNS)):
    confident = _confident(found)
    boxes = _boxes(found, confident)
    painted = image.astype(np.float64)
    if "box_masks" in found:
      masks = found["box_masks"][confident].astype(float)
      corners = found["boxes_xyxy"][confident].astype(float)
      pasted = paste_masks(masks, corners, (image.shape[0], image.shape[1]))
      for mask, (_, color) in zip(pasted, boxes, strict=True):
        painted[mask] = 0.3 * painted[mask] + 0.7 * 255 * np.array(to_rgb(color))
    rows[0].append(Tile(image))
    names = _names(found, confident, trained.task.class_names)
    rows[1].append(Tile(np.rint(painted).astype(np.uint8), names, boxes))
  return rows


def ttsr(run: str) -> list[list[Tile]]:
  """Two images: input, bicubic, TTSR, truth, reference, the difference of TTSR and bicubic."""
  trained, rows = load(run), []
  for example in examples("demo:stereo", [1, 4]):
    truth, reference = example["image"], example["reference"]
    small = shrink(truth)
    result = create_predictor(trained, Options(reference=reference))(small).pictures[""]
    bicubic = enlarge(small, list(truth.shape[:2]))
    side = min(truth.shape[:2])
    left, other = (max((x.shape[1] - side) // 2, 0) for x in (truth, reference))
    square = slice(left, left + side)
    tiles = [
      Tile(small[:, left // 4 : (left + side) // 4], "input"),
      Tile(bicubic[:, square], f"bicubic {psnr_y(bicubic, truth):.1f} dB"),
      Tile(np.asarray(result)[:, square], f"TTSR {psnr_y(np.asarray(result), truth):.1f} dB"),
      Tile(truth[:, square], "truth"),
      Tile(reference[:, other : other + side], "reference"),
      Tile(_difference(np.asarray(result), bicubic)[:, square], "TTSR - bicubic"),
    ]
    rows.append(tiles)
  return rows


def _difference(image: np.ndarray, other: np.ndarray) -> np.ndarray:
  return np.clip(128 + 2 * (image.astype(np.float64) - other), 0, 255).astype(np.uint8)


TRAIN = "python -m vit_jax_zoo.main --config=configs/"
PANELS = (
  Panel(
    "ViT", "classifies digits of 8×8 pixels", "vit_demo",
    f"{TRAIN}vit.py", ("prediction", "attention\nrollout"), vit,
  ),
  Panel(
    "iGPT", "completes the lower half, pixel by pixel", "igpt_demo",
    f"{TRAIN}igpt.py", ("digit 1", "digit 2"), igpt,
  ),
  Panel(
    "LambdaResNet", "classifies digits with lambda layers", "lambda_resnet_demo",
    f"{TRAIN}lambda_resnet.py", ("prediction", "norm of\nposition\nlambdas"), lambda_resnet,
  ),
  Panel(
    "DETR", "detects each digit by one query", "detr_demo",
    f"{TRAIN}detr.py", ("detections", "attention\nof the top\nquery"), detr,
  ),
  Panel(
    "TTSR", "4x super-resolution with a reference image", "ttsr_demo",
    f"{TRAIN}ttsr.py", ("image 1", "image 2"), ttsr,
  ),
  Panel(
    "FPT", "feature pyramid with attention across levels", "fpt_demo",
    f"{TRAIN}fpt.py", ("image", "detections"), fpt,
  ),
)  # fmt: skip


def compose(panels: Sequence[Panel], runs: dict[str, str]) -> Figure:
  """Draws all panels, two in a row; `runs` are paths by `Panel.run`."""
  panel_width = LEFT + COLUMNS * TILE + (COLUMNS - 1) * GAP
  panel_height = HEAD + 2 * (TILE + CAPTION) + BELOW
  width = 2 * panel_width + BETWEEN + 0.25 + RIGHT
  height = -(-len(panels) // 2) * panel_height + 0.1
  figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
  for index, panel in enumerate(panels):
    corner = (
      0.25 + (index % 2) * (panel_width + BETWEEN),
      height - (index // 2) * panel_height,
    )
    _draw_panel(figure, corner, panel, runs[panel.run])
  return figure


def _draw_panel(figure: Figure, corner: tuple[float, float], panel: Panel, run: str) -> None:
  width, height = figure.get_size_inches()
  left, top = corner

  def write(x: float, y: float, text: str, **style: Any) -> None:
    figure.text(x / width, y / height, text, **{"va": "top", "ha": "left", **style})

  write(left, top - 0.2, panel.system, fontsize=15, weight="bold")
  write(left, top - 0.47, panel.subtitle, fontsize=10.5, color=QUIET)
  if not pathlib.Path(run).exists():
    print(f"{panel.system}: {run} not found; run {panel.command}")  # noqa: T201
    write(left, top - HEAD, f"not run: {panel.command}", fontsize=10, color=QUIET)
    return
  if pathlib.Path(run).is_file():
    _draw_file(figure, corner, run)
    return
  for row, (name, tiles) in enumerate(zip(panel.rows, panel.tiles(run), strict=True)):
    bottom = top - HEAD - row * (TILE + CAPTION) - TILE
    write(left, bottom + TILE / 2, name, fontsize=9.5, color=QUIET, va="center")
    for column, tile in enumerate(tiles):
      x = left + LEFT + column * (TILE + GAP)
      place = (x / width, bottom / height, TILE / width, TILE / height)
      _draw_tile(figure.add_axes(place), tile)
      write(x + TILE / 2, bottom - 0.045, tile.caption, fontsize=8.5, ha="center")


def _draw_file(figure: Figure, corner: tuple[float, float], path: str) -> None:
  """Draws an image file, scaled to the panel."""
  width, height = figure.get_size_inches()
  with Image.open(path) as opened:
    pixels = np.array(opened.convert("RGB"))
  whole = LEFT + COLUMNS * TILE + (COLUMNS - 1) * GAP
  side = min(whole / pixels.shape[1], (2 * TILE + 2 * CAPTION) / pixels.shape[0])
  size = (side * pixels.shape[1], side * pixels.shape[0])
  bottom = corner[1] - HEAD - size[1]
  place = (corner[0] / width, bottom / height, size[0] / width, size[1] / height)
  ax = figure.add_axes(place)
  ax.imshow(pixels, interpolation="antialiased", aspect="auto")
  ax.set_axis_off()


def _draw_tile(ax: Axes, tile: Tile) -> None:
  small = max(tile.pixels.shape[:2]) < 100
  ax.imshow(tile.pixels, interpolation="nearest" if small else "antialiased", aspect="auto")
  ax.set(xticks=[], yticks=[])
  for spine in ax.spines.values():
    spine.set_visible(False)
  for (left, top, right, bottom), color in tile.boxes:
    box = Rectangle(
      (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec=color, lw=1.6
    )
    box.set_path_effects([patheffects.withStroke(linewidth=2.8, foreground="black", alpha=0.5)])
    ax.add_patch(box)


def main() -> None:
  """Parses the command line and writes the pictures."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", default="runs", help="folder of the demos' runs")
  parser.add_argument(
    "--run", action="append", default=[], metavar="SYSTEM=PATH", help="another run, or a PNG"
  )
  parser.add_argument("--output", default="docs/six.png")
  given = parser.parse_args()
  runs = {panel.run: str(pathlib.Path(given.runs, panel.run)) for panel in PANELS}
  systems = {panel.system.lower().replace("resnet", "_resnet"): panel.run for panel in PANELS}
  for text in given.run:
    system, _, path = text.partition("=")
    if system not in systems or not path:
      parser.error(f"--run={text}; expected SYSTEM=PATH, SYSTEM one of {', '.join(systems)}")
    runs[systems[system]] = path
  figure = compose(PANELS, runs)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  with Image.open(buffer) as picture:
    picture.convert("RGB").save(given.output, optimize=True)
  save_panels(given.output)
  print(f"wrote {given.output} and its panels")  # noqa: T201


def save_panels(path: str) -> None:
  """Writes each panel of the picture to `systems/<system>.png` beside it."""
  folder = pathlib.Path(path).parent / "systems"
  folder.mkdir(exist_ok=True)
  with Image.open(path) as picture:
    width, height = picture.width // 2, picture.height // 3
    for index, panel in enumerate(PANELS):
      left, top = index % 2 * width, index // 2 * height
      name = panel.run.removesuffix("_demo")
      part = picture.crop((left, top, left + width, top + height))
      part.save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
  main()
