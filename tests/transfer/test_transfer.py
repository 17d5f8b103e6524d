"""`python -m vit_jax_zoo.transfer`: all suites on embedded data."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from matplotlib.figure import Figure
from PIL import Image

from tests.conftest import golden_folder
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms import pixels
from vit_jax_zoo.inference.base import Trained
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import Task
from vit_jax_zoo.transfer import __main__ as command
from vit_jax_zoo.transfer import suites as benchmarks
from vit_jax_zoo.transfer.suites import SUITES, Dataset, Extractor, Outcome, Request, run_suites

FIT, TEST = "train[:300]", "test[:120]"


class Pixels:
  """A nearest-mean classifier whose features are the pixels."""

  def init(self, *args, **options):
    return {"params": {}}

  def apply(self, variables, images, *, train=False):
    features = images.reshape(images.shape[0], -1)
    distances = features[:, None] - variables["params"]["means"][None]
    return {"features": features, "logits": -jnp.sum(jnp.square(distances), axis=-1)}


def prepare(image):
  return {"image": cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA), "other": 1}


def normalised(source):
  images = np.stack([prepare(pixels(source[i]["image"]))["image"] for i in range(len(source))])
  return images.reshape(len(images), -1) / 127.5 - 1, np.array([e["label"] for e in source])


@pytest.fixture(scope="module")
def digits():
  """The training digits' means as a nearest-mean model."""
  features, labels = normalised(load_source("demo:digits", FIT))
  means = np.stack([features[labels == label].mean(0) for label in range(10)]).astype(np.float32)
  task = create_task("classification", Pixels(), num_classes=10)
  trained = Trained("pixels", task, {"params": {"means": means}}, prepare, (8, 8), "pixels")
  return Extractor(trained, batch_size=50)


def request_of(suites, **fields):
  return Request(suites, fit_split=FIT, test_split=TEST, **fields)


def test_several_probes_in_one_run(digits, tmp_path):
  sgd = {"linear_sgd": {"num_epochs": 40}, "few_shot": {"shots": (1, 5, 25)}}
  suites = ("few_shot", "linear", "linear_sgd", "knn")
  request = request_of(suites, data=("demo:digits",), probes=sgd)
  assert command.run_and_write(request, digits, tmp_path, {"model": "pixels"}) == 0
  kept = json.loads((tmp_path / "transfer.json").read_text())
  found = {suite: kept["suites"][suite]["demo:digits"] for suite in suites}
  assert all(scores["features"] == "features" for scores in found.values())
  assert found["few_shot"]["1_shot"] < found["few_shot"]["5_shot"] < found["few_shot"]["25_shot"]
  for suite in suites[1:]:
    assert found[suite]["accuracy"] > 0.8, suite
  assert (kept["model"], kept["missing"]) == ("pixels", {})
  assert {path.name for path in tmp_path.glob("*.png")} == {f"{suite}.png" for suite in suites}


@pytest.mark.parametrize("name", ["knn.png", "transfer.json"])
def test_files_of_others_kept(name, digits, tmp_path):
  (tmp_path / name).write_text("{}")
  with pytest.raises(ValueError, match="--output="):
    command.run_and_write(request_of(("knn",), data=("demo:digits",)), digits, tmp_path, {})
  assert (tmp_path / name).read_text() == "{}"


def test_missing_data_reported_and_skipped(digits, tmp_path):
  request = request_of(("knn",), data=("cifar10", "demo:digits"), data_dir=str(tmp_path / "none"))
  assert command.run_and_write(request, digits, tmp_path, {}) == 0
  kept = json.loads((tmp_path / "transfer.json").read_text())
  assert set(kept["suites"]["knn"]) == {"demo:digits"}
  assert (
    "run python -m vit_jax_zoo.data.prepare --dataset=cifar10" in kept["missing"]["knn on cifar10"]
  )
  request = request_of(("vtab",), data_dir=str(tmp_path / "none"))
  assert command.run_and_write(request, digits, tmp_path, {}) == 1
  kept = json.loads((tmp_path / "transfer.json").read_text())
  assert len(kept["missing"]) == 19
  assert kept["means"]["vtab"] == {}


def test_vtab_protocol(digits, tmp_path, monkeypatch):
  """On embedded data: sizes, held-out images, means by group."""
  monkeypatch.setattr(benchmarks, "VTAB_TRAIN", 300)
  monkeypatch.setattr(benchmarks, "VTAB_VALIDATION", 80)
  task = Dataset("demo:digits", (FIT, TEST, TEST), group="natural")
  ends = ("0:40", "60:100", "130:170", "200:240")
  learned = "+".join(f"train[{end}]" for end in ends)
  photos = Dataset("demo:photos", (learned, "test[:80]", "test[:80]"), group="structured")
  missing = Dataset("tfds:eurosat/rgb", ("train", "train", "test"), group="specialized")
  table = {"digits": task, "photos": photos, "eurosat": missing}
  monkeypatch.setattr(benchmarks, "VTAB", table)
  source_sizes = []
  inner = Extractor.features

  def spy(self, source, **options):
    source_sizes.append(len(source))
    return inner(self, source, **options)

  monkeypatch.setattr(Extractor, "features", spy)
  request = Request(("vtab",), data_dir=str(tmp_path / "none"))
  assert command.run_and_write(request, digits, tmp_path, {}) == 0
  kept = json.loads((tmp_path / "transfer.json").read_text())
  assert source_sizes == [380, 120, 240, 80]
  assert kept["suites"]["vtab"]["digits"]["accuracy"] > 0.85
  assert kept["means"]["vtab"] == {
    group: kept["suites"]["vtab"][name]["accuracy"]
    for group, name in (("natural", "digits"), ("structured", "photos"))
  }
  monkeypatch.setattr(benchmarks, "VTAB", {"digits": task, "photos": photos})
  scores = kept["suites"]["vtab"]
  outcomes = [
    Outcome("vtab", name, {"accuracy": scores[name]["accuracy"]}) for name in ("digits", "photos")
  ]
  means = command.results(outcomes)["means"]["vtab"]
  assert means["mean"] == pytest.approx((means["natural"] + means["structured"]) / 2)


def test_long_dataset_names_truncated_in_file_names(digits, tmp_path, monkeypatch):
  found = Outcome("knn", "folder:/" + 300 * "ä", {"accuracy": 1.0}, figures={"x": Figure()})
  monkeypatch.setattr(command, "run_suites", lambda *_: [found])
  assert command.run_and_write(Request(("knn",)), digits, tmp_path, {}) == 0
  assert len(list(tmp_path.glob("knn_*_x.png"))) == 1


def test_imagenet_variants(digits, tmp_path):
  source = load_source("demo:digits", TEST)
  three = [i for i in range(len(source)) if source[i]["label"] < 3]
  split = "+".join(f"test[{i}:{i + 1}]" for i in three)
  features, labels = normalised(load_source("demo:digits", split))
  means = digits._trained.variables["params"]["means"]
  distances = np.square(features[:, None] - means[None]).sum(-1)
  request = Request(("imagenet", "v2", "a", "r"), ("demo:digits",), test_split=split)
  found = {outcome.suite: outcome.scores for outcome in run_suites(request, digits)}
  whole = float((distances.argmin(1) == labels).mean())
  assert found["imagenet"]["accuracy"] == found["v2"]["accuracy"] == pytest.approx(whole)
  assert found["imagenet"]["classes"] == 3  # of ten
  among = float((distances[:, :3].argmin(1) == labels).mean())
  assert found["a"]["accuracy"] == found["r"]["accuracy"] == pytest.approx(among)
  assert among >= whole
  assert found["imagenet"]["images"] == found["a"]["images"] == len(three)


def test_image_folders(digits, tmp_path):
  rng = np.random.default_rng(0)
  for split, count in (("train", 12), ("test", 5)):
    for label, name in enumerate(("dark", "light")):
      folder = tmp_path / "images" / split / name
      folder.mkdir(parents=True)
      for i in range(count):
        image = rng.integers(150 * label, 100 + 150 * label, (9, 11, 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
  source = f"folder:{tmp_path / 'images'}"
  request = Request(("few_shot",), (source,), probes={"few_shot": {"shots": (1, 5)}})
  (outcome,) = run_suites(request, digits)
  assert outcome.scores["5_shot"] == 1
  (outcome,) = run_suites(Request(("knn",), (source,)), digits)
  assert outcome.scores["accuracy"] == 1
  with pytest.raises(ValueError, match=r"10 classes; expected the 2 of folder:"):
    list(run_suites(Request(("imagenet",), (source,)), digits))


def knn_of(trained, folder):
  """Returns the k-NN scores on digits, and the names of the figures."""
  request = request_of(("knn",), data=("demo:digits",))
  extractor = Extractor(trained, batch_size=64)
  assert command.run_and_write(request, extractor, folder, {"model": trained.model_name}) == 0
  kept = json.loads((folder / "transfer.json").read_text())["suites"]["knn"]["demo:digits"]
  return kept, {path.name for path in folder.glob("*.png")}


def test_published_file_without_head(tmp_path):
  path = str(golden_folder("vit_hf_base_a"))
  with pytest.raises(ValueError, match="has no classifier"):
    load(path)
  scores, figures = knn_of(load(path, needs_head=False), tmp_path)
  assert scores["accuracy"] > 0.2  # chance is 0.1; the weights are random
  assert (scores["features"], figures) == ("features", {"knn.png"})


def test_igpt_layer_selected_on_held_out_images(tmp_path):
  sizes = {"num_colors": 4, "num_positions": 64, "width": 8, "depth": 2, "num_heads": 2}
  task = create_task("pixel_modelling", create_model("igpt_s", **sizes), palette_images=20)
  source = load_source("demo:digits", FIT)
  images = np.stack([prepare(pixels(source[i]["image"]))["image"] for i in range(0, 300, 15)])
  batch = {"image": images}
  variables = {**jax.jit(task.init)(jax.random.key(0), batch), **task.init_from_data([batch])}
  scores, figures = knn_of(Trained("igpt", task, variables, prepare, (8, 8), "igpt"), tmp_path)
  assert scores["features"] == f"layer_{scores['best_layer']:.0f}"
  assert scores["accuracy"] == scores[scores["features"]] > 0.2
  assert {"layer_0", "layer_1", "layer_2", "pixels"} < scores.keys()
  assert figures == {"knn.png", "knn_demo_digits_depth.png"}


def test_invalid_requests_raise(digits, tmp_path):
  with pytest.raises(ValueError, match="suite 'fewshot'"):
    Request(("fewshot",))
  with pytest.raises(ValueError, match="linear, linear_sgd"):
    Request(())
  with pytest.raises(ValueError, match="few_shot 'cifar'"):
    list(run_suites(Request(("few_shot",), ("cifar",)), digits))
  with pytest.raises(ValueError, match=r"demo:digits: .*vtab"):
    list(run_suites(Request(("vtab",), ("demo:digits",)), digits))
  with pytest.raises(ValueError, match="batch_size: 0"):
    Extractor(digits._trained, batch_size=0)
  assert len(set(SUITES)) == len(SUITES)


class TaskWithoutFeatures(Task):
  """A task without features, like detection."""

  best_metric = "score"

  def init(self, rng, batch):
    return {}

  def loss(self, variables, batch, context):
    raise NotImplementedError

  def predict(self, variables, batch):
    return {}

  def evaluator(self):
    raise NotImplementedError


def test_task_without_features_raises():
  extractor = Extractor(Trained("boxes", TaskWithoutFeatures(), {}, prepare, None, "boxes"))
  with pytest.raises(ValueError, match="TaskWithoutFeatures"):
    list(run_suites(request_of(("knn",), data=("demo:digits",)), extractor))
  with pytest.raises(ValueError, match="boxes: not a classifier"):
    list(run_suites(request_of(("real",), data=("demo:digits",)), extractor))


def test_command_flags(tmp_path, monkeypatch):
  values = flags.FlagValues()
  monkeypatch.setattr(command, "FLAGS", values)
  monkeypatch.setattr(command.flags, "DEFINE_string", _define(values, flags.DEFINE_string))
  for kind in ("list", "integer", "enum", "bool"):
    name = f"DEFINE_{kind}"
    monkeypatch.setattr(command.flags, name, _define(values, getattr(flags, name)))
  command.define_flags()
  values(
    [
      "transfer",
      f"--model={golden_folder('vit_a') / 'weights.npz'}",
      "--suite=few_shot,linear_sgd",
      "--data=demo:digits",
      f"--fit_split={FIT}",
      f"--test_split={TEST}",
      "--sgd_epochs=3",
      f"--output={tmp_path / 'out'}",
    ]
  )
  assert command.main(["transfer"]) == 0
  kept = json.loads((tmp_path / "out" / "transfer.json").read_text())
  assert kept["model"] == "weights.npz"
  assert set(kept["suites"]) == {"few_shot", "linear_sgd"}
  with pytest.raises(ValueError, match="unexpected argument 'more'"):
    command.main(["transfer", "more"])


def _define(values, define):
  return lambda *args, **kwargs: define(*args, **kwargs, flag_values=values)
