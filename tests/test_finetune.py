"""Fine-tuning: published weights and runs of our own, on a folder of images, at another size."""

import cv2
import jax
import numpy as np
import pytest
from etils import epath

from configs import vit
from tests.conftest import GOLDENS
from vit_jax_zoo import experiment, export, load_pretrained, predict
from vit_jax_zoo.inference import create_predictor
from vit_jax_zoo.inference.base import Options
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.train.metric_writer import read_metrics

WEIGHTS = GOLDENS / "vit_posemb_a" / "weights.npz"  # 4 x 4 patches of 8, 20 classes, pre_logits
SIZES = {"width": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96, "patch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Three classes that differ in colour, in pictures of several shapes."""
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
  config = vit.get_config(f"b16_finetune,{options},learning_rate=0.03")
  config.model.update(SIZES, dtype="float32")
  config.data.loader.num_workers = 0
  config.num_steps, config.eval_every, config.log_every = 24, 0, 8
  config.checkpoint.every = 0
  config.optimizer.schedule.warmup_steps = 4
  with config.ignore_type():
    config.update(fields)
  return config


@pytest.fixture(scope="module")
def finetuned(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finetuned")
  return experiment.run(finetune(folder, WEIGHTS), epath.Path(workdir)), workdir


def test_published_weights_learn_the_classes_of_a_folder(finetuned):
  outcome, workdir = finetuned
  assert outcome.scores["test/images"] == 18
  assert outcome.scores["test/accuracy"] > 0.8
  losses = [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]
  assert losses[0] > losses[-1]


def test_the_run_starts_from_the_published_encoder_with_a_fresh_head(folder):
  made = experiment.create(finetune(folder, WEIGHTS))
  with jax.set_mesh(made.mesh):
    program = made.program(next(made.train_batches()))
    state = program.initial_state(0, lambda v: experiment._read_weights(str(WEIGHTS), v))
  published = np.load(WEIGHTS)
  params = jax.tree.map(np.asarray, state.params)
  np.testing.assert_array_equal(params["embedding"]["kernel"], published["embedding/kernel"])
  assert params["position_embedding"]["table"].shape == (1, 37, 48)  # 6 x 6 patches now
  assert params["head"]["kernel"].shape == (48, 3)
  assert not params["head"]["kernel"].any()
  assert "pre_logits" not in params


def test_a_run_of_our_own_is_fine_tuned_in_turn(finetuned, folder, tmp_path):
  _, workdir = finetuned
  config = finetune(folder, workdir, num_steps=1)
  config.optimizer.learning_rate = 0.0
  before = experiment.run(config, epath.Path(tmp_path / "same"))
  assert before.scores["test/accuracy"] == finetuned[0].scores["test/accuracy"]
  larger = finetune(folder, workdir, num_steps=1)
  transforms = [{"name": "resize", "size": 64}]
  larger.data.train.transforms = transforms
  larger.data.eval.test.transforms = larger.data.eval.val.transforms = transforms
  outcome = experiment.run(larger, epath.Path(tmp_path / "larger"))
  assert outcome.state.params["position_embedding"]["table"].shape == (1, 65, 48)


def test_weights_that_do_not_fit_are_listed_in_one_line(finetuned, folder, tmp_path):
  _, workdir = finetuned
  for source in (WEIGHTS, workdir):
    config = finetune(folder, source)
    config.model.mlp_dim = 64
    with pytest.raises(ValueError, match=r"mlp/hidden/kernel|Dense_0/kernel") as error:
      experiment.run(config, epath.Path(tmp_path))
    assert "\n" not in str(error.value)


def test_an_exported_vit_learns_new_classes_and_says_their_names(folder, tmp_path):
  """The whole way: weights out, weights in, new classes, and a picture of the user's own."""
  export.write(load_pretrained(str(WEIGHTS), representation_size=None), "npz", f"{tmp_path}/x.npz")
  config = finetune(folder, f"{tmp_path}/x.npz")
  outcome = experiment.run(config, epath.Path(tmp_path / "run"))
  assert outcome.scores["test/accuracy"] > 0.8
  predictor = create_predictor(load(str(tmp_path / "run")), Options(top_k=3))
  files = sorted((folder / "test").rglob("*.jpg"))
  said = [predictor(predict.read_image(file)).record["top"][0]["name"] for file in files]
  right = [name == file.parent.name for name, file in zip(said, files, strict=True)]
  assert np.mean(right) == outcome.scores["test/accuracy"]
  top = predictor(predict.read_image(files[0])).record["top"]
  assert sorted(entry["name"] for entry in top) == ["blue", "green", "red"]
