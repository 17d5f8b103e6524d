"""A classifier that compiles fast, and a batch for it."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

NUM_CLASSES = 7


class TinyClassifier(nn.Module):
  """A two-layer classifier, optionally with BatchNorm and dropout."""

  num_classes: int = NUM_CLASSES
  batch_norm: bool = False
  dropout_rate: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, images, *, train=False):
    flat = images.reshape(images.shape[0], -1)
    features = nn.Dense(16, dtype=jnp.dtype(self.dtype))(flat)
    if self.batch_norm:
      features = nn.BatchNorm(use_running_average=not train)(features)
    features = nn.Dropout(self.dropout_rate, deterministic=not train)(nn.relu(features))
    logits = nn.Dense(self.num_classes, dtype=jnp.dtype(self.dtype))(features)
    return {"logits": logits, "features": features}


@pytest.fixture(scope="session")
def tiny_classifier():
  return TinyClassifier


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8),
    "label": rng.integers(0, NUM_CLASSES, 12).astype(np.int32),
  }
