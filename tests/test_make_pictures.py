"""`docs/make_pictures.py`: all panels, from the demos' models without training or compilation."""

import importlib.util
import sys
import types

import jax
import numpy as np
import pytest

from tests.conftest import GOLDENS
from vit_jax_zoo import builder, config
from vit_jax_zoo.data.sources import demo

ROOT = GOLDENS.parents[1]


@pytest.fixture(scope="module")
def make_pictures():
  spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs/make_pictures.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules["make_pictures"] = module  # dataclasses look up their module
  spec.loader.exec_module(module)
  return module


class Traced:
  """Stands in for `compute`: ones in the shapes of the outputs, traced once."""

  shapes = None

  def __call__(self, function, variables, batch):
    self.shapes = self.shapes or jax.eval_shape(function, variables, batch)
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), self.shapes)


def load_demo(run):
  """Stands in for `load`: a demo's task, and the shapes of its variables."""
  name = run.removesuffix("_demo")
  task = builder.build(config.load(str(ROOT / f"configs/{name}.py"))).task
  side = 64 if name == "detr" else 8
  batch = {"image": np.zeros((1, side, side, 3), np.float32)}
  variables = jax.eval_shape(task.init, jax.random.key(0), batch)
  return types.SimpleNamespace(task=task, variables=variables, prepare=lambda x: {"image": x})


def tiles_of(make_pictures, system):
  panel = next(panel for panel in make_pictures.PANELS if panel.system == system)
  rows = panel.tiles(panel.run)
  assert [len(row) for row in rows] == [make_pictures.COLUMNS] * len(panel.rows)
  assert {tile.pixels.dtype for row in rows for tile in row} == {np.dtype(np.uint8)}
  return rows


@pytest.mark.long
@pytest.mark.parametrize(
  ("system", "caption"),
  [
    ("ViT", "1 (truth 7)"),
    ("LambdaResNet", "1 (truth 7)"),
    ("DETR", " ".join("1" * 12)),  # of 12 queries
  ],
)
def test_tiles_of_task(system, caption, make_pictures, monkeypatch):
  monkeypatch.setattr(make_pictures, "compute", Traced())
  monkeypatch.setattr(make_pictures, "load", load_demo)
  assert tiles_of(make_pictures, system)[0][0].caption == caption


def test_confident_detections_with_masks(make_pictures, monkeypatch, tmp_path):
  monkeypatch.setenv("VIT_JAX_ZOO_CACHE", str(tmp_path))  # drawing all 4,400 scenes takes 20 s
  monkeypatch.setattr(demo, "COUNTS", {"train": 1, "test": 14})
  found = {
    "scores": np.array([[0.9, 0.6, 0.8, 0.95]]),
    "labels": np.array([[3, 4, 5, 6]]),
    "is_object": np.array([[True, True, True, False]]),
    "boxes_xyxy": np.array([[[32, 0, 64, 64], [0, 0, 9, 9], [0, 0, 16, 16], [0, 0, 9, 9]]], float),
    "box_masks": np.ones((1, 4, 7, 7)),
  }
  task = types.SimpleNamespace(predict=None, class_names=tuple("0123456789"))
  run = types.SimpleNamespace(task=task, variables={}, prepare=lambda x: {"image": x})
  monkeypatch.setattr(make_pictures, "compute", lambda *_: found)
  monkeypatch.setattr(make_pictures, "load", lambda _: run)
  (image, *_), (tile, *_) = tiles_of(make_pictures, "FPT")
  assert tile.caption == "5 3"  # from left to right
  assert len(tile.boxes) == 2
  changed = (tile.pixels != image.pixels).any(axis=-1)
  assert changed[1:63, 33:63].mean() > 0.99
  assert not changed[20:, :30].any()


def test_tiles_of_predictor(make_pictures, monkeypatch):
  size = {"samples": (16, 6 * 16 + 5 * 2, 3), "": (96, 112, 3)}
  found = {name: np.full(shape, 7, np.uint8) for name, shape in size.items()}
  prediction = types.SimpleNamespace(pictures=found)
  monkeypatch.setattr(make_pictures, "load", str)
  monkeypatch.setattr(make_pictures, "create_predictor", lambda *_: lambda _: prediction)
  captions = [tile.caption for tile in tiles_of(make_pictures, "iGPT")[1]]
  assert captions == ["prefix", *["sample"] * 4, "original"]
  captions = [tile.caption for tile in tiles_of(make_pictures, "TTSR")[0]]
  assert captions[1].startswith("bicubic 2")  # dB
  assert captions[5] == "TTSR - bicubic"


def test_missing_runs_named(make_pictures, tmp_path, capsys):
  runs = {panel.run: str(tmp_path / panel.run) for panel in make_pictures.PANELS}
  figure = make_pictures.compose(make_pictures.PANELS, runs)
  texts = [text.get_text() for text in figure.texts]
  for panel in make_pictures.PANELS:
    assert {panel.system, panel.subtitle, f"not run: {panel.command}"} <= set(texts)
  assert capsys.readouterr().out.count("not found") == len(make_pictures.PANELS)
