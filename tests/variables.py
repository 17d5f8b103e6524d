"""Random variables with a model's shapes: tracing an initialization is faster than compiling it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn


def random_variables(init, *args, small=(), seed=0):
  """Returns the tree of `init(rng, *args)` with normal numbers, none of which is zero.

  Kernels have variance 1 / fan-in, norms' scales and variances are near 1. `small` names parts
  with a hundredth of that, as heads are initialized.
  """
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    names = [key.key for key in path]
    std = np.prod(shape.shape[:-1]) ** -0.5 if len(shape.shape) > 1 else 0.1
    std *= 0.01 if set(names) & set(small) else 1
    values = rng.normal(names[-1] in ("scale", "var"), std, shape.shape)
    return jnp.asarray(values.astype(np.float32))

  return jax.tree.map_with_path(leaf, jax.eval_shape(init, jax.random.key(0), *args))


_INIT, _SHAPES = nn.Module.init, {}


def _init_once(model, rngs, *args, **fields):
  kinds = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  key = repr((model, kinds, fields))
  if key not in _SHAPES:
    init = functools.partial(_INIT, model, **fields)
    _SHAPES[key] = jax.eval_shape(init, jax.random.key(0), *kinds)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _SHAPES[key])


@pytest.fixture(autouse=True)
def trace_once(monkeypatch):
  """For files that import it: traces initializations once per model; all variables are zero."""
  monkeypatch.setattr(nn.Module, "init", _init_once)
