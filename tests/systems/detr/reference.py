"""Models and weights of the official DETR fixtures."""

import functools
import json

import jax
import jax.numpy as jnp
from etils import epath
from safetensors.numpy import load_file

from vit_jax_zoo.systems.detr import weights_official as detr_official
from vit_jax_zoo.systems.detr.model import Detr
from vit_jax_zoo.weights import key_map as table
from vit_jax_zoo.weights.load import flatten_variables, unflatten_variables
from vit_jax_zoo.weights.readers import Published


def model_of(config, **overrides):
  """Returns the model that a fixture's config.json describes."""
  fields = {
    "num_classes": config["num_classes"],
    "num_queries": config["num_queries"],
    "width": config["hidden_dim"],
    "encoder_depth": config["enc_layers"],
    "decoder_depth": config["dec_layers"],
    "num_heads": config["nheads"],
    "mlp_dim": config["dim_feedforward"],
    "position_embedding": config["position_embedding"],
    "mask_head": config["masks"],
    "dropout_rate": 0.0,
    "backbone": {
      "blocks": tuple(config["depths"]),
      "widths": tuple(config["stage_planes"]),
      "stem_width": config["stem_width"],
      "output_stride": 16 if config["dilation"] else 32,
    },
  }
  return Detr(**(fields | overrides))


def read_variables(path, config):
  """Returns the variables of `model_of(config)` from a file with the official names."""
  return variables_of(load_file(path), config)


def variables_of(tensors, config):
  """Returns the variables from tensors by official name, with or without the `detr.` prefix."""
  if config["masks"] and "class_embed.weight" in tensors:
    own = ("bbox_attention.", "mask_head.")
    tensors = {k if k.startswith(own) else f"detr.{k}": array for k, array in tensors.items()}
  abstract = _abstract_variables(json.dumps(config))
  checkpoint = detr_official.read_checkpoint(Published("fixture", epath.Path("fixture"), tensors))
  shapes = {path: leaf.shape for path, leaf in flatten_variables(abstract).items()}
  layers = table.read(
    checkpoint.arrays,
    checkpoint.table,
    table.unroll_shapes(shapes),
    source="fixture",
    ignore=checkpoint.ignore,
  )
  return unflatten_variables(table.stack(layers, shapes), abstract)


@functools.cache
def _abstract_variables(config):
  model = model_of(json.loads(config))
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
