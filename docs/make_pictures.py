"""Draws docs/six.png, and its parts docs/systems/*.png: the systems at work after their demos.

    for system in vit igpt lambda_resnet detr ttsr fpt; do
      python -m vit_jax_zoo.main --config=configs/$system.py
    done
    python docs/make_pictures.py

Each run is loaded as `predict` loads it, and used on images that it has not seen in training.
`--run=fpt=runs/fpt_demo_mask` takes another run, here one that has masks; one that is missing is
named, and its place says how to make it. In place of a run's folder there may be a picture that the
run has written, a PNG in its `figures`, which is then shown as it is.
"""

import argparse
import dataclasses
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import jax
import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms.super_resolution import enlarge, shrink
from vit_jax_zoo.figures.detection import COLORS
from vit_jax_zoo.inference import create_predictor
from vit_jax_zoo.inference.base import Options, Trained
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.ops.mask_paste import paste_masks
from vit_jax_zoo.systems.ttsr.psnr_ssim import psnr_y

COLUMNS = 6
TILE, GAP = 0.92, 0.07  # inches
LEFT, RIGHT, BETWEEN = 0.95, 0.3, 0.45  # of a panel: the rows' names; the page's edge; two panels
HEAD, CAPTION, BELOW = 0.82, 0.22, 0.12  # above the tiles; below each row; below a panel
QUIET = "#5b6067"


@dataclasses.dataclass(frozen=True)
class Tile:
  """A picture in the grid.

  Attributes:
    pixels: uint8 [h w 3].
    caption: below it.
    boxes: left, top, right, bottom in pixels of the picture, and a colour.
  """

  pixels: np.ndarray
  caption: str = ""
  boxes: Sequence[tuple[np.ndarray, str]] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
  """One system.

  Attributes:
    system: its name.
    claim: what there is to be seen, in a line.
    run: the folder that its demo writes.
    command: what makes that.
    rows: the names of the two rows.
    tiles: draws them, two rows of `COLUMNS`.
  """

  system: str
  claim: str
  run: str
  command: str
  rows: tuple[str, str]
  tiles: Callable[[str], list[list[Tile]]]


def examples(source: str, indices: Sequence[int]) -> list[dict[str, Any]]:
  """Returns test examples with their images decoded, uint8 [h w 3]."""
  test = load_source(source, "test")
  found = []
  for index in indices:
    example = dict(test[index])
    for key in ("image", "reference"):
      if key in example:
        with Image.open(io.BytesIO(example[key])) as opened:
          example[key] = np.array(opened.convert("RGB"))
    found.append(example)
  return found


def darken(image: np.ndarray, weights: np.ndarray, least: float = 0.0) -> np.ndarray:
  """Returns the image, lit where the weights are large."""
  small = max(image.shape[:2]) < 64
  method = cv2.INTER_NEAREST if small else cv2.INTER_LINEAR
  light = cv2.resize(np.asarray(weights, np.float32), image.shape[1::-1], interpolation=method)
  light = np.clip(light / max(float(light.max()), 1e-9), 0, 1)[..., None]
  return np.rint(image * (least + (1 - least) * light)).astype(np.uint8)


def explained_digits(run: str) -> tuple[dict[str, Any], list[str]]:
  """Returns what a classifier of digits shows of six of them, and what it takes them for."""
  trained = load(run)
  digits = examples("demo:digits", [40, 80, 115, 190, 260, 330])
  images = np.stack([np.asarray(trained.prepare(digit["image"])["image"]) for digit in digits])
  seen = jax.device_get(jax.jit(trained.task.explain)(trained.variables, {"image": images}))
  names = [str(label) for label in seen["label"]]
  true = [str(digit["label"]) for digit in digits]
  said = [n if n == t else f"{n} (is {t})" for n, t in zip(names, true, strict=True)]
  return seen, said


def vit(run: str) -> list[list[Tile]]:
  """Digits, named; and where the Transformer looked."""
  seen, names = explained_digits(run)
  pictures, maps = seen["image"], seen["explanation"].looked_at
  return [
    [Tile(image, name) for image, name in zip(pictures, names, strict=True)],
    [Tile(darken(image, looked)) for image, looked in zip(pictures, maps, strict=True)],
  ]


def lambda_resnet(run: str) -> list[list[Tile]]:
  """Digits, named; and how strongly the lambda of each place acts, in the last finest map."""
  seen, names = explained_digits(run)
  lambdas = seen["explanation"].lambdas
  norms = lambdas[max(lambdas, key=lambda name: (lambdas[name].size, name))]
  light = [(x - x.min()) / max(float(x.max() - x.min()), 1e-9) for x in norms]
  colors = [np.rint(255 * colormaps["viridis"](x)[..., :3]).astype(np.uint8) for x in light]
  pictures = seen["image"]
  return [
    [Tile(image, name) for image, name in zip(pictures, names, strict=True)],
    [Tile(color) for color in colors],
  ]


def igpt(run: str) -> list[list[Tile]]:
  """Two halves of digits, each completed four times, and what was there."""
  predictor = create_predictor(load(run), Options(samples=4, seed=1))
  return [_completions(predictor, digit["image"]) for digit in examples("demo:digits", [46, 298])]


def _completions(predictor: Any, image: np.ndarray) -> list[Tile]:
  strip = predictor(image).pictures["samples"]
  side = strip.shape[0]
  gap = (strip.shape[1] - COLUMNS * side) // (COLUMNS - 1)
  cells = [strip[:, i * (side + gap) : i * (side + gap) + side] for i in range(COLUMNS)]
  return [Tile(cell, name) for cell, name in zip(cells, ("given", *["drawn"] * 4, "truth"))]  # noqa: B905


def _scenes(trained: Trained, task: Any, indices: Sequence[int]) -> list[tuple[Any, ...]]:
  """Returns scenes of the test set, and what was found in each."""
  predict, found = jax.jit(task.predict), []
  for scene in examples("demo:scenes", indices):
    image = scene["image"]
    prepared = trained.prepare(image)
    batch = {
      "image": np.asarray(prepared["image"])[None],
      "original_size": np.array([image.shape[:2]], np.int32),
    }
    seen = jax.device_get(predict(trained.variables, batch))
    found.append((image, {key: value[0] for key, value in seen.items()}))
  return found


def _sure(found: dict[str, np.ndarray], threshold: float = 0.7) -> np.ndarray:
  sure = found["scores"] >= threshold
  if "is_object" in found:
    sure &= found["is_object"]
  return np.flatnonzero(sure)


def _said(found: dict[str, np.ndarray], sure: np.ndarray, names: Sequence[str]) -> str:
  left_to_right = sure[np.argsort(found["boxes_xyxy"][sure][:, 0], kind="stable")]
  return " ".join(names[int(label)] for label in found["labels"][left_to_right])


def detr(run: str) -> list[list[Tile]]:
  """Scenes with boxes; and where the query of the surest box looked."""
  trained = load(run)
  task = dataclasses.replace(trained.task, draw_attention=True)  # type: ignore[type-var]
  rows: list[list[Tile]] = [[], []]
  for image, found in _scenes(trained, task, range(2, 2 + COLUMNS)):
    sure = _sure(found)
    boxes = [
      (box, COLORS[label % len(COLORS)])
      for box, label in zip(found["boxes_xyxy"][sure], found["labels"][sure], strict=True)
    ]
    rows[0].append(Tile(image, _said(found, sure, trained.task.class_names), boxes))
    best = int(np.argmax(found["scores"]))
    color = COLORS[found["labels"][best] % len(COLORS)]
    lit = darken(image, found["attention"][best], least=0.15)
    rows[1].append(Tile(lit, "", [(found["boxes_xyxy"][best], color)]))
  return rows


def fpt(run: str) -> list[list[Tile]]:
  """Scenes; and the masks that were found in them (boxes, of a run without masks)."""
  trained = load(run)
  rows: list[list[Tile]] = [[], []]
  for image, found in _scenes(trained, trained.task, range(8, 8 + COLUMNS)):
    sure = _sure(found)
    said = _said(found, sure, trained.task.class_names)
    colors = [COLORS[label % len(COLORS)] for label in found["labels"][sure]]
    boxes = found["boxes_xyxy"][sure]
    painted = image.astype(np.float64)
    if "box_masks" in found:
      size = (image.shape[0], image.shape[1])
      masks = paste_masks(found["box_masks"][sure].astype(float), boxes.astype(float), size)
      for mask, color in zip(masks, colors, strict=True):
        painted[mask] = 0.3 * painted[mask] + 0.7 * 255 * np.array(to_rgb(color))
    rows[0].append(Tile(image))
    drawn = list(zip(boxes, colors, strict=True))
    rows[1].append(Tile(np.rint(painted).astype(np.uint8), said, drawn))
  return rows


def ttsr(run: str) -> list[list[Tile]]:
  """Two pictures: small, enlarged by bicubic interpolation and by TTSR, truth, reference."""
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
      Tile(small[:, left // 4 : (left + side) // 4], "given"),
      Tile(bicubic[:, square], f"bicubic {psnr_y(bicubic, truth):.1f} dB"),
      Tile(np.asarray(result)[:, square], f"TTSR {psnr_y(np.asarray(result), truth):.1f} dB"),
      Tile(truth[:, square], "truth"),
      Tile(reference[:, other : other + side], "reference"),
      Tile(_difference(np.asarray(result), bicubic)[:, square], "what it added"),
    ]
    rows.append(tiles)
  return rows


def _difference(image: np.ndarray, other: np.ndarray) -> np.ndarray:
  return np.clip(128 + 2 * (image.astype(np.float64) - other), 0, 255).astype(np.uint8)


TRAIN = "python -m vit_jax_zoo.main --config=configs/"
PANELS = (
  Panel(
    "ViT", "names digits of 8×8 pixels, and shows where it looked", "vit_demo",
    f"{TRAIN}vit.py", ("picture", "attention,\nrolled out"), vit,
  ),
  Panel(
    "iGPT", "draws the lower half, pixel by pixel", "igpt_demo",
    f"{TRAIN}igpt.py", ("a digit", "another"), igpt,
  ),
  Panel(
    "LambdaResNet", "names them without attention, through lambdas", "lambda_resnet_demo",
    f"{TRAIN}lambda_resnet.py", ("picture", "norm of\nlambdas"), lambda_resnet,
  ),
  Panel(
    "DETR", "finds the digits in a scene, each by one query", "detr_demo",
    f"{TRAIN}detr.py", ("boxes", "where the\nsurest\nlooked"), detr,
  ),
  Panel(
    "TTSR", "enlarges four times, with textures of a reference", "ttsr_demo",
    f"{TRAIN}ttsr.py", ("a part", "another"), ttsr,
  ),
  Panel(
    "FPT", "finds them on a pyramid whose levels see each other", "fpt_demo",
    f"{TRAIN}fpt.py", ("picture", "found"), fpt,
  ),
)  # fmt: skip


def compose(panels: Sequence[Panel], runs: dict[str, str]) -> Figure:
  """Draws all panels, two in a row."""
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
  write(left, top - 0.47, panel.claim, fontsize=10.5, color=QUIET)
  if not pathlib.Path(run).exists():
    print(f"{panel.system}: {run} is not there; run {panel.command}")  # noqa: T201
    write(left, top - HEAD, f"not yet run: {panel.command}", fontsize=10, color=QUIET)
    return
  if pathlib.Path(run).is_file():
    _draw_whole(figure, corner, run)
    return
  for row, (name, tiles) in enumerate(zip(panel.rows, panel.tiles(run), strict=True)):
    bottom = top - HEAD - row * (TILE + CAPTION) - TILE
    write(left, bottom + TILE / 2, name, fontsize=9.5, color=QUIET, va="center")
    for column, tile in enumerate(tiles):
      x = left + LEFT + column * (TILE + GAP)
      place = (x / width, bottom / height, TILE / width, TILE / height)
      _draw_tile(figure.add_axes(place), tile)
      write(x + TILE / 2, bottom - 0.045, tile.caption, fontsize=8.5, ha="center")


def _draw_whole(figure: Figure, corner: tuple[float, float], path: str) -> None:
  """Draws a picture that a run has written, as large as the panel's tiles allow."""
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
  """Reads the command line, and writes the picture."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", default="runs", help="the folder in which the demos' runs lie")
  parser.add_argument(
    "--run", action="append", default=[], metavar="SYSTEM=FOLDER", help="a run from elsewhere"
  )
  parser.add_argument("--output", default="docs/six.png")
  given = parser.parse_args()
  runs = {panel.run: str(pathlib.Path(given.runs, panel.run)) for panel in PANELS}
  systems = {panel.system.lower().replace("resnet", "_resnet"): panel.run for panel in PANELS}
  for text in given.run:
    system, _, folder = text.partition("=")
    if system not in systems or not folder:
      parser.error(f"--run={text}: write one of {', '.join(systems)}, =, and a folder")
    runs[systems[system]] = folder
  figure = compose(PANELS, runs)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  with Image.open(buffer) as picture:
    picture.convert("RGB").save(given.output, optimize=True)
  save_panels(given.output)
  print(f"wrote {given.output} and its panels")  # noqa: T201


def save_panels(path: str) -> None:
  """Writes each panel of the picture by itself, `systems/<system>.png` beside it."""
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
