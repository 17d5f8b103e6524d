"""Batches that are not the recipe's: what is due, and what is said."""

import pytest

from configs import common, vit
from vit_jax_zoo.config import load
from vit_jax_zoo.training.lr_scaling import advise, rule_of, scaled_rate
from vit_jax_zoo.training.optim import OPTIMIZERS


def test_every_optimizer_has_a_rule():
  assert {name: rule_of(name) for name in OPTIMIZERS} == {
    "adafactor": "root", "adam": "root", "adamw": "root", "lamb": "root", "lion": "root",
    "sgd": "linear",
  }  # fmt: skip


def test_the_rules_are_those_of_the_papers():
  # Goyal et al.: 0.1 for 256 images is 3.2 for 8192. Malladi et al.: a quarter of the batch, half.
  assert scaled_rate("sgd", 0.1, 8192, 256) == pytest.approx(3.2)
  assert scaled_rate("adamw", 1e-3, 1024, 4096) == pytest.approx(5e-4)


def said(config):
  return advise(config.to_dict())


@pytest.mark.parametrize(
  ("config", "words"),
  [
    (load("configs/vit.py:b16_finetune,batch_size=32"),
     ["batch_size 32 instead of 512: linear scaling suggests "
      "--config.optimizer.learning_rate=0.001875 (now 0.03); or keep the batch: "
      "--config.batch_size=512 --config.accumulation_steps=16"]),
    (load("configs/vit.py:b16_imagenet21k,batch_size=64"),
     ["batch_size 64 instead of 4096: square-root scaling suggests "
      "--config.optimizer.learning_rate=0.000125 (now 0.001)"]),
    (load("configs/vit.py:b16_imagenet21k,batch_size=40960"),
     ["batch_size 40960 instead of 4096: "]),
    (load("configs/fpt.py:segmentation_voc"), []),
  ],
  ids=("sgd", "adamw", "larger", "the recipe's own"),
)  # fmt: skip
def test_a_rate_that_does_not_follow_is_a_warning(config, words):
  found = said(config)
  assert len(found) == len(words)
  for advice, start in zip(found, words, strict=True):
    assert start in advice.text
    assert "\n" not in advice.text
    assert advice.is_warning


@pytest.mark.parametrize(
  ("config", "change"),
  [
    (
      load("configs/detr.py:r50,batch_size=4"),
      "square-root scaling of the learning rate, 0.0001 -> 2.5e-05",
    ),
    (
      load("configs/lambda_resnet.py:lambda152_256,batch_size=256"),
      "linear scaling of the learning rate, 1.6 -> 0.1",
    ),
    (
      load("configs/fpt.py:mask_rcnn_r50_fpt_coco,batch_size=2"),
      "linear scaling of the learning rate, 0.05 -> 0.00625",
    ),
  ],
  ids=("detr", "lambda_resnet", "fpt"),
)
def test_recipes_that_scale_their_rate_say_so(config, change):
  (advice,) = said(config)
  assert not advice.is_warning
  assert change in advice.text


def test_a_rate_that_was_chosen_for_the_batch_is_left_alone():
  assert said(load("configs/vit.py:b16_finetune,batch_size=32,learning_rate=0.002")) == []
  assert said(load("configs/vit.py:b16_finetune,batch_size=256")) == []  # near enough


def test_a_flag_that_sets_the_batch_is_noticed_for_every_optimizer_group():
  config = load("configs/ttsr.py:cufed,source=pairs:x")
  config.batch_size = 1
  found = said(config)
  assert {a.text.split("--config.")[1].split("=")[0] for a in found} == {
    "optimizer.generator.learning_rate",
    "optimizer.discriminator.learning_rate",
  }
  config = load("configs/igpt.py:s_imagenet")
  config.batch_size = 8
  (advice,) = said(config)
  assert "--config.optimizer.learning_rate=0.00025 (now 0.001)" in advice.text
  assert "--config.batch_size=128 --config.accumulation_steps=16" in advice.text


def test_the_recipe_is_that_of_the_other_fields():
  """iGPT's rate goes with the size of the images: that is no departure from the recipe."""
  config = load("configs/igpt.py:l_imagenet,image_size=48,learning_rate=0.5")
  assert config.recipe.to_dict() == {"batch_size": 128, "learning_rates": {"optimizer": 1e-2}}


def test_a_config_that_states_its_recipe_is_left_alone():
  def make(*, batch_size: int = 8):
    config = vit.demo(batch_size=batch_size)
    config.recipe = {"batch_size": 512, "learning_rates": {"optimizer": 0.03}}
    return config

  assert common.build("", {"make": make}).recipe.batch_size == 512


def test_a_config_without_a_recipe_says_nothing():
  config = load("configs/vit.py:demo,batch_size=1")
  config.recipe = {"batch_size": None, "learning_rates": {}}
  assert said(config) == []
