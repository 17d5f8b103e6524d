"""Errors of bfloat16 results and gradients relative to float32."""

import jax
import jax.numpy as jnp
import numpy as np


def bfloat16_errors(function, *inputs):
  """Returns the relative errors of `function`'s result and of its gradients, one per input.

  The result is weighted by numbers that are mostly of one sign, so that gradients are sums that
  grow: those lose terms in a bfloat16 accumulator.
  """
  half = [x.astype(jnp.bfloat16) for x in inputs]

  def total(*inputs):
    out = function(*inputs).astype(jnp.float32)
    weights = 1 + jax.random.normal(jax.random.key(0), out.shape)
    return jnp.sum(out * weights), out

  run = jax.jit(jax.value_and_grad(total, tuple(range(len(inputs))), has_aux=True))
  (_, rough), rough_grads = run(*half)
  (_, exact), exact_grads = run(*(x.astype(jnp.float32) for x in half))
  return [
    float(np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b))
    for a, b in zip([rough, *rough_grads], [exact, *exact_grads], strict=True)
  ]
