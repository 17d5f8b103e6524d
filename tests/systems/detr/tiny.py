"""Small detection models for tests: one with fixed outputs, one with parameters."""

import flax.linen as nn
import jax.numpy as jnp


class Echo:
  """A model with fixed outputs, to test the loss alone."""

  def __init__(self, outputs):
    self.outputs = {name: jnp.asarray(value) for name, value in outputs.items()}
    self.num_queries = outputs["logits"].shape[1]
    self.mask_head = "mask_logits" in outputs

  def init(self, rng, images, mask, *, train=False):
    return {"params": {}}

  def apply(self, variables, images, mask, *, train=False, rngs=None, mutable=False):
    return (self.outputs, {}) if mutable is not False else self.outputs


class TinyDetector(nn.Module):
  """Linear predictions from the flattened image; padding is zeroed."""

  num_classes: int = 4
  num_queries: int = 6
  layers: int = 2
  mask_head: bool = False  # read by the task; the model predicts no masks

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
