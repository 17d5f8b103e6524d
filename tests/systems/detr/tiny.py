"""Stand-ins for detection models: fixed outputs, and a cheap one with parameters."""

import flax.linen as nn
import jax.numpy as jnp


class Echo:
  """A 'model' whose outputs are given, to test the loss alone."""

  def __init__(self, outputs):
    self.outputs = {name: jnp.asarray(value) for name, value in outputs.items()}
    self.num_queries = outputs["logits"].shape[1]
    self.mask_head = "mask_logits" in outputs

  def init(self, rng, images, mask, *, train=False):
    return {"params": {}}

  def apply(self, variables, images, mask, *, train=False, rngs=None, mutable=False):
    return (self.outputs, {}) if mutable is not False else self.outputs


class TinyDetector(nn.Module):
  """Names objects by what an image's corners hold; sees no padding."""

  num_classes: int = 4
  num_queries: int = 6
  layers: int = 2
  mask_head: bool = False  # said, for the task to know; it predicts none

  @nn.compact
  def __call__(self, images, mask, *, train=False):
    images = jnp.where(mask[..., None], images, 0)
    flat = images.reshape(images.shape[0], -1)
    outputs = []
    for layer in range(self.layers):
      x = nn.Dense(self.num_queries * (self.num_classes + 5), name=f"layer_{layer}")(flat)
      outputs.append(x.reshape(-1, self.num_queries, self.num_classes + 5))
    logits = jnp.stack([x[..., 4:] for x in outputs])
    boxes = nn.sigmoid(jnp.stack([x[..., :4] for x in outputs]))
    return {
      "logits": logits[-1],
      "boxes_cxcywh": boxes[-1],
      "auxiliary_logits": logits[:-1],
      "auxiliary_boxes_cxcywh": boxes[:-1],
    }
