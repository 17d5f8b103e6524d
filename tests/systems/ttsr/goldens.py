"""Narrow discriminator and VGG-19 of the official TTSR goldens, with their weights."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tests.conftest import golden_folder
from vit_jax_zoo import weights
from vit_jax_zoo.systems.ttsr.losses import VGG19, Discriminator
from vit_jax_zoo.systems.ttsr.model import TTSR
from vit_jax_zoo.systems.ttsr.task import SuperResolution
from vit_jax_zoo.systems.ttsr.weights import VGG_IGNORE, VGG_TABLE
from vit_jax_zoo.weights import key_map


class NarrowTask(SuperResolution):
  """The task with a narrow discriminator and VGG-19."""

  _discriminator = Discriminator((2, 4, 8, 16, 32), 64)
  _vgg = VGG19(("relu5_1",), (4, 8, 16, 32, 32))


WEIGHTS = {"perceptual_weight": 1e-2, "transferal_weight": 1e-2, "adversarial_weight": 1e-3}
TINY = TTSR(width=8, depths=(1, 1, 1, 1), texture_widths=(4, 6, 8))


FILE = golden_folder("ttsr_a") / "weights.safetensors"


def load_golden_model(**fields):
  """Returns the model with the official weights, and its variables."""
  loaded = weights.load_pretrained(str(FILE), **fields)
  return loaded.model, loaded.variables


def nhwc(array):
  return jnp.asarray(np.moveaxis(array, 1, -1))


def discriminator_params(arrays, side):
  """Returns the discriminator's parameters; the official code flattens channels first."""
  params = {}
  for i in range(1, 11):
    name = f"conv{(i + 1) // 2}_{2 - i % 2}"
    kernel = arrays[f"discriminator.conv{i}.weight"].transpose(2, 3, 1, 0)
    params[name] = {"kernel": kernel, "bias": arrays[f"discriminator.conv{i}.bias"]}
  hidden = arrays["discriminator.fc1.weight"]
  hidden = (
    hidden.reshape(len(hidden), -1, side, side).transpose(2, 3, 1, 0).reshape(-1, len(hidden))
  )
  params["hidden"] = {"kernel": hidden, "bias": arrays["discriminator.fc1.bias"]}
  score = arrays["discriminator.fc2.weight"].T
  params["score"] = {"kernel": score, "bias": arrays["discriminator.fc2.bias"]}
  return jax.tree.map(jnp.asarray, params)


def vgg_params(arrays):
  """Returns VGG-19's parameters from torchvision's names."""
  published = {
    key.replace("vgg19.slice1", "features"): array
    for key, array in arrays.items()
    if key.startswith("vgg19.slice1")
  }
  task = NarrowTask(TINY)
  shapes = jax.eval_shape(task._vgg.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  flat = traverse_util.flatten_dict(shapes["params"], sep="/")
  layers = key_map.read(
    published,
    VGG_TABLE,
    {path: leaf.shape for path, leaf in flat.items()},
    source="the fixture",
    ignore=VGG_IGNORE,
  )
  return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(layers, sep="/"))
