"""LambdaResNet variables from timm's state dict, and back."""

import numpy as np

from vit_jax_zoo.systems.lambda_resnet import weights_timm
from vit_jax_zoo.weights import key_map
from vit_jax_zoo.weights.load import flatten_variables, unflatten_variables


def read_variables(published, variables, source):
  shapes = {path: leaf.shape for path, leaf in flatten_variables(variables).items()}
  table, ignore = weights_timm.TABLE, weights_timm.IGNORE
  flat = key_map.read(published, table, shapes, source=source, ignore=ignore)
  return unflatten_variables(flat, variables)


def write_variables(variables):
  flat = flatten_variables(variables)
  return weights_timm.write_flat({path: np.asarray(array) for path, array in flat.items()})
