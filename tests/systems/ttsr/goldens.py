"""For the official TTSR's goldens: a narrow critic and VGG-19, and their weights in our layout."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit_jax_zoo.systems.ttsr import weights_vgg as vgg_torchvision
from vit_jax_zoo.systems.ttsr.model import TTSR
from vit_jax_zoo.systems.ttsr.task import SuperResolution
from vit_jax_zoo.weights import key_map

NARROW = {
  "critic_widths": (2, 4, 8, 16, 32),
  "critic_hidden": 64,
  "perceptual_widths": (4, 8, 16, 32, 32),
}
WEIGHTS = {"perceptual_weight": 1e-2, "transferal_weight": 1e-2, "adversarial_weight": 1e-3}
TINY = TTSR(width=8, depths=(1, 1, 1, 1), texture_widths=(4, 6, 8))


def nhwc(array):
  return jnp.asarray(np.moveaxis(array, 1, -1))


def critic_params(weights, side):
  """The official critic's; it flattens channels first, ours last."""
  params = {}
  for i in range(1, 11):
    name = f"conv{(i + 1) // 2}_{2 - i % 2}"
    kernel = weights[f"discriminator.conv{i}.weight"].transpose(2, 3, 1, 0)
    params[name] = {"kernel": kernel, "bias": weights[f"discriminator.conv{i}.bias"]}
  hidden = weights["discriminator.fc1.weight"]
  hidden = (
    hidden.reshape(len(hidden), -1, side, side).transpose(2, 3, 1, 0).reshape(-1, len(hidden))
  )
  params["hidden"] = {"kernel": hidden, "bias": weights["discriminator.fc1.bias"]}
  score = weights["discriminator.fc2.weight"].T
  params["score"] = {"kernel": score, "bias": weights["discriminator.fc2.bias"]}
  return jax.tree.map(jnp.asarray, params)


def vgg_params(weights):
  """The official VGG-19's, by torchvision's names."""
  published = {
    key.replace("vgg19.slice1", "features"): array
    for key, array in weights.items()
    if key.startswith("vgg19.slice1")
  }
  task = SuperResolution(TINY, **NARROW)
  shapes = jax.eval_shape(task._vgg.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  flat = traverse_util.flatten_dict(shapes["params"], sep="/")
  found = key_map.read(
    published,
    vgg_torchvision.TABLE,
    {path: leaf.shape for path, leaf in flat.items()},
    source="the fixture",
    ignore=vgg_torchvision.IGNORE,
  )
  return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(found, sep="/"))
