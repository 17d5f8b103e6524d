"""Fine-tuning on image folders, from published weights and from runs, at another image size."""

import functools
import io
import logging
import pathlib
import re

import cv2
import jax
import numpy as np
import pytest
from absl import logging as absl_logging
from etils import epath
from PIL import Image

from configs import finetune as finetune_own
from tests.conftest import golden_folder, system_module
from vit_jax_zoo import config as config_lib
from vit_jax_zoo import export, load_pretrained, trainer
from vit_jax_zoo.builder import build
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources.demo import read_photo
from vit_jax_zoo.inference.base import Options, create_predictor, read_image
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.training.checkpoint import restore_variables
from vit_jax_zoo.training.metric_writer import read_metrics
from vit_jax_zoo.training.optim import create_optimizer
from vit_jax_zoo.weights.hub import entries

system_module("vit")

ROOT = pathlib.Path(__file__).parents[1]
# 4 x 4 patches of 8, 20 classes, pre_logits.
WEIGHTS = golden_folder("vit_posemb_a") / "weights.npz"
SIZES = {"width": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96, "patch_size": 8}


@pytest.fixture(autouse=True, scope="module")
def _one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "build", functools.partial(build, devices=jax.devices()[:1]))
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Three classes that differ in color, in images of several sizes."""
  rng = np.random.default_rng(0)
  root = tmp_path_factory.mktemp("images")
  for name, colour in {"blue": (220, 60, 40), "green": (50, 200, 60), "red": (40, 50, 230)}.items():
    for split, count in (("train", 20), ("test", 6)):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        height, width = rng.integers(40, 80, 2)
        noise = rng.normal(0, 40, (height, width, 3))
        image = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
        cv2.imwrite(str(root / split / name / f"{i}.jpg"), image)
  return root


def finetune(folder, init_from, **fields):
  options = f"image_size=48,source=folder:{folder},init_from={init_from},batch_size=8"
  config = config_lib.load(f"configs/vit.py:b16_finetune,{options},learning_rate=0.03")
  config.model.update(SIZES, dtype="float32")
  config.data.loader.num_workers = 0
  config.num_steps, config.eval_every, config.log_every, config.explain = 24, 0, 8, False
  config.checkpoint.every = 0
  config.optimizer.schedule.warmup_steps = 4
  with config.ignore_type():
    config.update(fields)
  return config


@pytest.fixture(scope="module")
def finetuned(folder, tmp_path_factory):
  """A run from the published weights, exported once before."""
  workdir = tmp_path_factory.mktemp("finetuned")
  weights = f"{workdir}/exported.npz"
  export.write(load_pretrained(str(WEIGHTS), representation_size=None), "npz", weights)
  return trainer.run(finetune(folder, weights), epath.Path(workdir / "run")), workdir / "run"


def test_finetuned_run_classifies_folder(finetuned, folder):
  outcome, workdir = finetuned
  predictor = create_predictor(load(str(workdir)), Options(top_k=3))
  files = sorted((folder / "test").rglob("*.jpg"))
  tops = [predictor(read_image(file)).record["top"] for file in files]
  correct = [top[0]["name"] == file.parent.name for top, file in zip(tops, files, strict=True)]
  assert np.mean(correct) == pytest.approx(outcome.scores["test/accuracy"])
  assert sorted(entry["name"] for entry in tops[0]) == ["blue", "green", "red"]
  assert outcome.scores["test/images"] == 18
  assert outcome.scores["test/accuracy"] > 0.8
  losses = [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]
  assert losses[0] > losses[-1]


def initializer(task, path):
  return lambda fresh: trainer.pretrained_variables(fresh, task, str(path), ())


def test_initial_state_published_encoder_new_head(folder):
  made = trainer.build(finetune(folder, WEIGHTS))
  with jax.set_mesh(made.mesh):
    program = made.program(next(made.train_batches()))
    state = program.initial_state(0, initializer(made.task, WEIGHTS))
  published = np.load(WEIGHTS)
  params = jax.tree.map(np.asarray, state.params)
  np.testing.assert_array_equal(params["embedding"]["kernel"], published["embedding/kernel"])
  assert params["position_embedding"]["table"].shape == (1, 37, 48)  # now 6 x 6 patches
  assert params["head"]["kernel"].shape == (48, 3)
  assert not params["head"]["kernel"].any()
  assert "pre_logits" not in params


@pytest.mark.slow
def test_finetune_from_run(finetuned, folder, tmp_path):
  _, workdir = finetuned
  config = finetune(folder, workdir, num_steps=1)
  config.optimizer.learning_rate = 0.0
  before = trainer.run(config, epath.Path(tmp_path / "same"))
  assert before.scores["test/accuracy"] == finetuned[0].scores["test/accuracy"]
  larger = finetune(folder, workdir, num_steps=1)
  transforms = [{"name": "resize", "size": 64}]
  larger.data.train.transforms = transforms
  larger.data.eval.test.transforms = larger.data.eval.val.transforms = transforms
  outcome = trainer.run(larger, epath.Path(tmp_path / "larger"))
  assert outcome.state.params["position_embedding"]["table"].shape == (1, 65, 48)


def test_mismatched_weights_listed(finetuned, folder):
  config = finetune(folder, WEIGHTS)
  config.model.mlp_dim = 64
  made = trainer.build(config)
  with jax.set_mesh(made.mesh):
    program = made.program(next(made.train_batches()))
    for source in (WEIGHTS, finetuned[1]):
      with pytest.raises(ValueError, match=r"mlp/hidden/kernel|Dense_0/kernel") as error:
        program.initial_state(0, initializer(made.task, source))
      assert "\n" not in str(error.value)


NAMES = ("cat", "galaxies", "retina")


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
  """Crops of photographs as JPEG and PNG, truncated images, and files that are not images."""
  rng = np.random.default_rng(0)
  root = tmp_path_factory.mktemp("photos")
  for name in NAMES:
    (root / name).mkdir()
    photo = read_photo(name)
    for i in range(26):
      height, width = rng.integers(36, 60, 2)
      top, left = (int(rng.integers(side - 60)) for side in photo.shape[:2])
      crop = Image.fromarray(photo[top : top + height, left : left + width])
      crop.save(root / name / f"{i}.{'jpg' if i % 2 else 'png'}")
    crop.convert("L").save(root / name / "grey.png")
  whole = (root / "cat" / "1.jpg").read_bytes()
  for i in range(3):
    (root / "cat" / f"truncated{i}.jpg").write_bytes(whole[: len(whole) // 2])
  (root / "retina" / "notes.txt").write_text("not an image")
  (root / "retina" / "renamed.png").write_text("nor is this")
  return root


@pytest.fixture(scope="module")
def photo_run(photo_folder, tmp_path_factory):
  """Outcome, folder and log of the fine-tuning config with a small ViT."""
  workdir = tmp_path_factory.mktemp("photo_folder")
  argument = (
    f"model=vit_ti16,source=folder:{photo_folder},init_from={WEIGHTS},image_size=32,batch_size=8"
  )
  overrides = [f"--config.model.{name}={value}" for name, value in SIZES.items()]
  config = config_lib.load(
    f"{ROOT}/configs/finetune.py:{argument},num_epochs=4,learning_rate=0.03,dtype=float32",
    [*overrides, "--config.explain=False"],
  )
  logged = io.StringIO()
  handler = logging.StreamHandler(logged)
  absl_logger = logging.getLogger("absl")
  absl_logger.addHandler(handler)
  verbosity = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.INFO)
  try:
    outcome = trainer.run(config, epath.Path(workdir))
  finally:
    absl_logger.removeHandler(handler)
    absl_logging.set_verbosity(verbosity)
  return outcome, workdir, logged.getvalue()


def test_finetune_config_learns_photos(photo_run):
  outcome, workdir, logged = photo_run
  assert outcome.scores["best/test/accuracy"] > 0.8
  assert outcome.scores["best/val/loss"] <= outcome.scores["val/loss"]
  assert sum(f"test/accuracy/{name}" in outcome.scores for name in NAMES) >= 2  # of 8 images
  figures = {path.stem for path in (workdir / "figures").iterdir()}
  assert "class_balance_00000000" in figures
  assert any(name.startswith("test_confusion") for name in figures)
  assert any(name.startswith("train_batch") for name in figures)
  assert "test/accuracy/retina" not in logged  # per-class scores are written, not logged


def test_unreadable_files_logged_and_counted(photo_run, photo_folder):
  outcome, workdir, logged = photo_run
  assert "files that are not images: retina/notes.txt" in logged
  broken = {*(f"cat/truncated{i}.jpg" for i in range(3)), "retina/renamed.png"}
  training = load_source(f"folder:{photo_folder}", "fit")
  paths = {training.example_name(i) for i in range(len(training))}
  skipped = {name for name in broken if f"{photo_folder}/{name}" in paths}
  assert skipped
  (listed,) = re.findall(r"^(\d+) examples could not be read and were skipped: (.*)$", logged, re.M)
  assert int(listed[0]) == len(skipped)
  assert {name for name in broken if name in listed[1]} == skipped
  counted = [row["data/skipped_images"] for row in read_metrics(workdir) if "train/loss" in row]
  assert counted[-1] >= 3 * len(skipped)  # in four epochs
  evaluated = sum(outcome.scores.get(f"{split}/skipped_images", 0) for split in ("val", "test"))
  assert evaluated == len(broken) - len(skipped)


def test_class_counts_and_learning_rate_advice_logged(photo_run):
  _, _, logged = photo_run
  assert re.search(r"train: \d+ examples of 3 classes: cat \d+, galaxies \d+, retina \d+", logged)
  assert "linear scaling suggests --config.optimizer.learning_rate=0.00046" in logged


def test_best_checkpoint_exported_with_class_names(photo_run, photo_folder, tmp_path):
  outcome, workdir, _ = photo_run
  pretrained = load_pretrained(str(workdir))
  best = restore_variables(workdir / "best")
  jax.tree.map(np.testing.assert_array_equal, pretrained.variables, best)
  for form in ("safetensors-timm", "orbax"):
    export.write(pretrained, form, f"{tmp_path}/{form}")
    predictor = create_predictor(load(f"{tmp_path}/{form}"), Options(top_k=1))
    test = load_source(f"folder:{photo_folder}", "test")
    files = [pathlib.Path(test.example_name(i)) for i in range(len(test))]
    readable = [file for file in files if "truncated" not in file.name and file.stem != "renamed"]
    predicted = [predictor(read_image(file)).record["top"][0]["name"] for file in readable]
    correct = [name == file.parent.name for name, file in zip(predicted, readable, strict=True)]
    assert np.mean(correct) == pytest.approx(outcome.scores["best/test/accuracy"], abs=0.1)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("model=vit_b61", "'vit_b61'.*'vit_b16'"),
    ("model=detr_r50", "classifier 'detr_r50'"),
    ("model=lambda_resnet_152", "'lambda_resnet_152'.* init_from="),
    ("data=folder:x", "finetune 'data'"),
  ],
)
def test_invalid_config_arguments_raise(argument, message):
  with pytest.raises(ValueError, match=message):
    finetune_own.get_config(argument)


def test_default_learning_rate_and_weights():
  config = config_lib.load("configs/finetune.py:model=vit_b16")
  assert config.optimizer.learning_rate == pytest.approx(0.03 * 32 / 512)
  assert config.init_from == "vit_b16_augreg_imagenet21k"
  fields = "model=lambda_resnet50ts,batch_size=256,num_epochs=4,head_only=true"
  config = config_lib.load(f"configs/finetune.py:{fields}")
  assert config.optimizer.learning_rate == 0.01
  assert config.init_from == "lambda_resnet50ts_imagenet"
  assert config.data.train.transforms[0]["size"] == 256
  assert config.eval_every == config.checkpoint.every == 0.25
  params = {"head": {"kernel": np.ones((2, 3))}, "stem": {"kernel": np.ones((2, 3))}}
  frozen = create_optimizer(config.optimizer.to_dict(), params, num_steps=10).frozen
  assert frozen == {"head": {"kernel": False}, "stem": {"kernel": True}}


def test_every_model_has_published_weights():
  for family in finetune_own.FAMILIES.values():
    for models in family.weights.values():
      for model in models:
        config = config_lib.load(f"configs/finetune.py:model={model}")
        assert entries()[config.init_from].model == model


def test_class_names_file_sets_labels(photo_folder, tmp_path):
  names = tuple(reversed(NAMES))
  (tmp_path / "names.txt").write_text("\n".join(names))
  fields = f"source=folder:{photo_folder},class_names={tmp_path / 'names.txt'}"
  made = trainer.build(config_lib.load(f"configs/finetune.py:model=vit_ti16,{fields}"))
  assert made.task.class_names == names
  assert made.eval_sources["test"].info.class_names == names


def test_lambda_resnet_head_only(photo_folder):
  fields = "model=lambda_resnet26t,image_size=64,batch_size=8,head_only=true,dtype=float32"
  made = trainer.build(
    config_lib.load(f"configs/finetune.py:{fields},source=folder:{photo_folder}")
  )
  program = made.program(next(made.train_batches()))
  params = program.abstract_state.params
  assert params["head"]["kernel"].shape[-1] == len(NAMES)
  frozen = dict(jax.tree_util.tree_leaves_with_path(program.optimizers[0].frozen))
  trained = {jax.tree_util.keystr(path) for path, is_frozen in frozen.items() if not is_frozen}
  assert trained == {"['head']['kernel']", "['head']['bias']"}
  assert made.task.image_mean == (0.485, 0.456, 0.406)
