"""Initial variables of TTSR: `init_from` and `vgg_file`."""

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
from vit_jax_zoo.systems.ttsr.task import SuperResolution
from vit_jax_zoo.trainer import pretrained_variables
from vit_jax_zoo.weights.checkpoint import Pretrained
from vit_jax_zoo.weights.key_map import WeightsError, unroll
from vit_jax_zoo.weights.load import writable_formats
from vit_jax_zoo.weights.preprocess import Preprocess

REC = SuperResolution(TINY, vgg_file="missing/vgg19.pth")
GAN = NarrowTask(TINY, perceptual_weight=1.0, adversarial_weight=1.0, vgg_file="missing/vgg19.pth")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  """Returns a file like TTSR-rec.pt of a small model, and the model's parameters."""
  fresh = zero_variables(REC)["params"]["generator"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.1, x.shape)), fresh)
  path = str(tmp_path_factory.mktemp("released") / "TTSR-rec.safetensors")
  flat = weights.load.flatten_variables({"params": params})
  exported = Pretrained(TINY, unroll(flat), Preprocess((16, 16)), {})
  writable_formats("ttsr")["pt"].write_checkpoint(path, exported)
  return path, params


def fresh_variables(task):
  return jax.tree.map(jnp.asarray, zero_variables(task))


def fail_on_data():
  raise AssertionError("training data were read")
  yield


def trees_equal(a, b):
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.long
def test_vgg_file_is_not_read_if_init_from_overwrites_it(released):
  path, params = released
  variables = pretrained_variables(fresh_variables(REC), REC, path, fail_on_data())
  assert trees_equal(variables["params"]["generator"], params)
  with pytest.raises(WeightsError, match=r"missing/vgg19\.pth"):
    pretrained_variables(fresh_variables(REC), REC, None, fail_on_data())
  with pytest.raises(WeightsError, match=r"missing/vgg19\.pth"):
    pretrained_variables(fresh_variables(GAN), GAN, path, fail_on_data())  # for the perceptual loss


def test_missing_vgg_file_raises_before_compilation(monkeypatch, tmp_path):
  config = load("configs/ttsr.py:demo")
  config.task.vgg_file = f"{tmp_path}/vgg19.pth"
  config.model.update(width=8, depths=(1, 1, 1, 1), texture_widths=(4, 8, 8))
  monkeypatch.setattr(trainer.Experiment, "program", fail_on_data)
  with pytest.raises(WeightsError, match=r"vgg19\.pth"):
    trainer.run(config, epath.Path(tmp_path / "run"), trainer.RunOptions())


def test_fit_to_model_with_or_without_discriminator(released):
  _, params = released
  gan, rec = fresh_variables(GAN), fresh_variables(REC)
  discriminator = jax.tree.map(np.asarray, gan["params"]["discriminator"])
  gan_run = {"params": {"generator": params, "discriminator": discriminator}}
  for source, target in (({"params": {"generator": params}}, gan), (gan_run, rec)):
    result = weights.fit_to_model(source, target, "the run", optional=GAN.train_only_collections)
    assert result.keys() == target.keys()
    assert trees_equal(result["params"]["generator"], params)
    others = {part: tree for part, tree in target["params"].items() if part != "generator"}
    assert trees_equal({part: result["params"][part] for part in others}, others)
  with pytest.raises(ValueError, match=r"discriminator/\S+ "):
    weights.fit_to_model(gan_run, rec, "the run")


@pytest.mark.long
def test_released_weights_evaluate_without_vgg_and_training_data(released, tmp_path, monkeypatch):
  """Uses the recipe with all losses; the only files are the weights and CUFED5."""
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
