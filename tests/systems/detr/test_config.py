"""DETR's recipes: trained parameters, learning rates and data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import detr
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.training.optim import create_optimizer

PARAMS = {}  # by the model's fields: several recipes have the same model


@functools.cache
def optimizer_and_params(variant):
  """Returns the recipe's optimizer, and its model's parameters by path."""
  config = detr.get_config(variant)
  fields = {k: 91 if v is None else v for k, v in config.model.to_dict().items()}
  if repr(fields) not in PARAMS:
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(create_model(**fields).init, jax.random.key(0), images)
    PARAMS[repr(fields)] = shapes["params"]
  params = PARAMS[repr(fields)]
  return create_optimizer(config.optimizer.to_dict(), params, num_steps=300), params


def count_trained(optimizer, params):
  sizes = jax.tree.map(lambda x, frozen: 0 if frozen else x.size, params, optimizer.frozen)
  return sum(jax.tree.leaves(sizes))


# Parameters trained by the official code: all, mask head only, and with other num_classes.
@pytest.mark.parametrize(
  ("variant", "expected"),
  [
    ("r50", 41_302_368),
    ("r101_dc5", 60_242_272),
    ("r50_masks", 42_899_288 - 41_524_768 - (250 - 91) * 257),
    ("r50_finetune", 41_302_368),
  ],
)
def test_trained_parameter_counts_equal_official_code(variant, expected):
  assert count_trained(*optimizer_and_params(variant)) == expected


def test_learning_rates_and_weight_decay_equal_paper():
  optimizer, params = optimizer_and_params("r50")
  ones = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim), params)  # the rules are by path
  zeros = jax.tree.map(jnp.zeros_like, ones)
  updates, _ = jax.jit(optimizer.tx.update)(zeros, optimizer.tx.init(ones), ones)
  flat = {
    k: float(np.abs(v).max()) for k, v in traverse_util.flatten_dict(updates, sep="/").items()
  }
  decay, rate = 1e-4, 1e-4
  assert flat["transformer/encoder/mlp/hidden/bias"] == pytest.approx(decay * rate)
  assert flat["transformer/decoder_norm/scale"] == pytest.approx(decay * rate)
  assert flat["backbone/c3_block0/conv1/conv/kernel"] == pytest.approx(decay * rate / 10)
  assert flat["backbone/c2_block0/conv1/conv/kernel"] == 0
  assert flat["backbone/stem/conv1/conv/kernel"] == 0


def test_own_data_sets_source_splits_and_init_from():
  config = detr.get_config("r50_finetune,source=coco:/mine,init_from=runs/mine")
  assert (config.data.train.split, config.data.eval.val.split) == ("train", "val")
  assert config.init_from == "runs/mine"
  assert detr.get_config("r50").data.eval.val.split == "validation"
  panoptic = detr.get_config("r50_masks,source=coco:/mine")
  assert panoptic.data.eval.val.panoptic
  assert panoptic.data.train.transforms[0]["masks"]


def test_learning_rate_schedule_equals_paper():
  rates = [float(optimizer_and_params("r50")[0].schedule(step)) for step in (0, 199, 200, 299)]
  assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])
  boundaries = detr.get_config("r50,num_epochs=500").optimizer.schedule.boundaries
  assert boundaries == (0.8,)
  assert detr.get_config("r50,batch_size=16").optimizer.learning_rate == pytest.approx(5e-5)
