"""Learning-rate scaling with batch size: rules, warnings and suggestions."""

import importlib

import pytest
from absl import logging

from configs import common
from tests.conftest import system_module
from vit_jax_zoo.config import load
from vit_jax_zoo.training.lr_scaling import advise, rule_of, scaled_rate
from vit_jax_zoo.training.optim import OPTIMIZERS


def test_rule_of_every_optimizer():
  assert {name: rule_of(name) for name in OPTIMIZERS} == {
    **dict.fromkeys(("adafactor", "adam", "adamw", "lamb", "lion"), "square-root"),
    "sgd": "linear",
  }  # fmt: skip


def test_scaled_rate_values_of_papers():
  # Goyal et al.: 0.1 at batch 256 is 3.2 at 8192. Malladi et al.: a quarter of the batch, half.
  assert scaled_rate("sgd", 0.1, 8192, 256) == pytest.approx(3.2)
  assert scaled_rate("adamw", 1e-3, 1024, 4096) == pytest.approx(5e-4)


def recipe(system, variant):
  system_module(system)
  return load(f"configs/{system}.py:{variant}")


def advice_for(config):
  return advise(config.to_dict())


@pytest.mark.parametrize(
  ("named", "words"),
  [
    (("vit", "b16_finetune,batch_size=32"),
     ["batch_size 32 instead of 512: linear scaling suggests "
      "--config.optimizer.learning_rate=0.001875 (now 0.03); or keep the batch: "
      "--config.batch_size=512 --config.accumulation_steps=16"]),
    (("vit", "b16_imagenet21k,batch_size=64"),
     ["batch_size 64 instead of 4096: square-root scaling suggests "
      "--config.optimizer.learning_rate=0.000125 (now 0.001)"]),
    (("vit", "b16_imagenet21k,batch_size=40960"), ["batch_size 40960 instead of 4096: "]),
    (("fpt", "segmentation_voc"), []),
  ],
  ids=("sgd", "adamw", "larger", "the recipe's own"),
)  # fmt: skip
def test_unscaled_rate_warns(named, words):
  found = advice_for(recipe(*named))
  assert len(found) == len(words)
  for advice, start in zip(found, words, strict=True):
    assert start in advice[1]
    assert "\n" not in advice[1]
    assert advice[0] == logging.WARNING


@pytest.mark.parametrize(
  ("named", "change"),
  [
    (
      ("detr", "r50,batch_size=4"),
      "square-root scaling of the learning rate, 0.0001 -> 2.5e-05",
    ),
    (
      ("lambda_resnet", "lambda152_256,batch_size=256"),
      "linear scaling of the learning rate, 1.6 -> 0.1",
    ),
    (
      ("fpt", "mask_rcnn_r50_fpt_coco,batch_size=2"),
      "linear scaling of the learning rate, 0.05 -> 0.00625",
    ),
  ],
  ids=("detr", "lambda_resnet", "fpt"),
)
def test_scaling_recipes_log_change(named, change):
  (advice,) = advice_for(recipe(*named))
  assert advice[0] == logging.INFO
  assert change in advice[1]


def test_explicit_rate_no_warning():
  assert advice_for(recipe("vit", "b16_finetune,batch_size=32,learning_rate=0.002")) == []
  assert advice_for(recipe("vit", "b16_finetune,batch_size=256")) == []  # within the tolerance


def test_batch_size_flag_warns_for_every_optimizer_group():
  config = recipe("ttsr", "cufed,source=pairs:x")
  config.batch_size = 1
  found = advice_for(config)
  assert {text.split("--config.")[1].split("=")[0] for _, text in found} == {
    "optimizer.generator.learning_rate",
    "optimizer.discriminator.learning_rate",
  }
  config = recipe("igpt", "s_imagenet")
  config.batch_size = 8
  (advice,) = advice_for(config)
  assert "--config.optimizer.learning_rate=0.00025 (now 0.001)" in advice[1]
  assert "--config.batch_size=128 --config.accumulation_steps=16" in advice[1]


def test_recipe_rate_of_config_arguments():
  """iGPT's rate depends on the image size: not a deviation from the recipe."""
  config = recipe("igpt", "l_imagenet,image_size=48,learning_rate=0.5")
  assert config.recipe.to_dict() == {"batch_size": 128, "learning_rates": {"optimizer": 1e-2}}


def test_recipe_in_config_kept():
  def build_config(*, batch_size: int = 8):
    config = importlib.import_module("configs.vit").demo(batch_size=batch_size)
    config.recipe = {"batch_size": 512, "learning_rates": {"optimizer": 0.03}}
    return config

  assert common.build("", {"build_config": build_config}).recipe.batch_size == 512


def test_config_without_recipe_no_advice():
  config = recipe("vit", "demo,batch_size=1")
  config.recipe = {"batch_size": None, "learning_rates": {}}
  assert advice_for(config) == []
