"""Initial variables: files whose values `init_from` would overwrite are not read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.systems.ttsr.test_weights import TINY, NarrowTask, zero_variables
from vit_jax_zoo import trainer, weights
from vit_jax_zoo.builder import build
from vit_jax_zoo.config import load
from vit_jax_zoo.initialization import Initializer
from vit_jax_zoo.systems.ttsr.task import SuperResolution
from vit_jax_zoo.weights import formats
from vit_jax_zoo.weights.checkpoint import Export
from vit_jax_zoo.weights.key_map import WeightsError, unroll
from vit_jax_zoo.weights.preprocess import Preprocess

REC = SuperResolution(TINY, vgg_file="missing/vgg19.pth")
GAME = NarrowTask(TINY, perceptual_weight=1.0, adversarial_weight=1.0, vgg_file="missing/vgg19.pth")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  """A file like TTSR-rec.pt, of a small model, and the model's parameters."""
  fresh = zero_variables(REC)["params"]["generator"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.1, x.shape)), fresh)
  path = str(tmp_path_factory.mktemp("released") / "TTSR-rec.safetensors")
  flat = weights.load.flatten_variables({"params": params})
  formats.write_checkpoint(path, "pt", Export("ttsr", TINY, unroll(flat), Preprocess((16, 16))))
  return path, params


def fresh_variables(task):
  return jax.tree.map(jnp.asarray, zero_variables(task))


def no_data():
  raise AssertionError("training data were read")
  yield


def same(a, b):
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_a_file_that_would_be_overwritten_is_not_read(released):
  path, params = released
  found = Initializer(REC, path, no_data())(fresh_variables(REC))
  assert same(found["params"]["generator"], params)
  with pytest.raises(WeightsError, match=r"no checkpoint at missing/vgg19\.pth"):
    Initializer(REC, None, no_data())(fresh_variables(REC))
  with pytest.raises(WeightsError, match=r"no checkpoint at missing/vgg19\.pth"):
    Initializer(GAME, path, no_data())(fresh_variables(GAME))  # the perceptual loss needs it


def test_a_missing_file_is_an_error_before_compilation(monkeypatch, tmp_path):
  config = load("configs/ttsr.py:demo")
  config.task.vgg_file = f"{tmp_path}/vgg19.pth"
  monkeypatch.setattr(trainer.Experiment, "program", no_data)
  with pytest.raises(WeightsError, match=r"no checkpoint at .*vgg19\.pth"):
    trainer.run(config, epath.Path(tmp_path / "run"), trainer.RunOptions())


def test_a_run_with_a_discriminator_starts_from_one_without_and_the_reverse(released):
  _, params = released
  game, alone = fresh_variables(GAME), fresh_variables(REC)
  discriminator = jax.tree.map(np.asarray, game["params"]["discriminator"])
  played = {"params": {"generator": params, "discriminator": discriminator}}
  for source, target in (({"params": {"generator": params}}, game), (played, alone)):
    found = weights.fit_to_model(source, target, "the run", optional=GAME.train_only_collections)
    assert found.keys() == target.keys()
    assert same(found["params"]["generator"], params)
    others = {part: tree for part, tree in target["params"].items() if part != "generator"}
    assert same({part: found["params"][part] for part in others}, others)
  with pytest.raises(ValueError, match=r"discriminator/\S+ has no place"):
    weights.fit_to_model(played, alone, "the run")


def test_released_weights_are_evaluated_without_vgg_and_training_data(
  released, tmp_path, monkeypatch
):
  """With the recipe that has all losses, and no files but the weights and CUFED5."""
  monkeypatch.setattr(trainer, "build", functools.partial(build, devices=jax.devices()[:1]))
  path, _ = released
  rng = np.random.default_rng(1)
  folder = tmp_path / "test" / "CUFED5"
  folder.mkdir(parents=True)
  for i in range(6):
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"000_{i}.png")
  config = load(f"configs/ttsr.py:cufed,source=pairs:{tmp_path},init_from={path}")
  config.task.vgg_file = "missing/vgg19.pth"
  config.model.update(width=8, depths=(2, 1, 1, 1), texture_widths=(4, 8, 8))
  config.data.loader.num_workers = 0
  config.eval_batch_size = 1
  del config.data.eval.cufed5_stitched
  options = trainer.RunOptions(eval_only=True)
  outcome = trainer.run(config, epath.Path(tmp_path / "run"), options)
  assert int(outcome.state.step) == 0
  assert set(outcome.state.variables["params"]) == {"generator"}
  assert "vgg" not in outcome.state.variables
  assert outcome.scores["cufed5_level1/images"] == 1
  assert np.isfinite(outcome.scores["cufed5_level1/psnr"])
  config.batch_size = 8
  with pytest.raises(ValueError, match="unknown split 'train'"):
    trainer.run(config, epath.Path(tmp_path / "run"), trainer.RunOptions())
