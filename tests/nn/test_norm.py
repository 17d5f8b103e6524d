import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.nn.norm import BatchNorm, FrozenBatchNorm, norm_factory


def activations(shape=(3, 4, 5, 6), mean=2.0):
  return jnp.asarray(np.random.default_rng(0).normal(mean, 3, shape), jnp.float32)


def apply_training(norm, x, variables=None):
  variables = variables or norm.init(jax.random.key(0), x, train=True)
  return norm.apply(variables, x, train=True, mutable=["batch_stats"])


def test_batch_norm_training_equals_pytorch():
  x = activations()
  out, state = apply_training(BatchNorm(momentum=0.9, epsilon=1e-3), x)
  flat = np.asarray(x, np.float64).reshape(-1, 6)
  expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-3)
  np.testing.assert_allclose(out.reshape(-1, 6), expected, atol=1e-5)
  np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * flat.mean(0), rtol=1e-5)
  unbiased = flat.var(0, ddof=1)
  np.testing.assert_allclose(state["batch_stats"]["var"], 0.9 + 0.1 * unbiased, rtol=1e-5)


def test_batch_norm_evaluation_uses_running_statistics():
  x, norm = activations(), BatchNorm()
  variables = {
    "params": {"scale": jnp.full(6, 2.0), "bias": jnp.full(6, 1.0)},
    "batch_stats": {"mean": jnp.full(6, 3.0), "var": jnp.full(6, 4.0)},
  }
  out = norm.apply(variables, x, train=False)
  np.testing.assert_allclose(out, (x - 3) / np.sqrt(4 + 1e-5) * 2 + 1, atol=1e-5)


def test_batch_norm_stable_for_large_mean():
  x = activations((64, 6), mean=1e4)
  norm = BatchNorm(momentum=0.0)
  _, state = apply_training(norm, x)
  variables = {"params": norm.init(jax.random.key(0), x, train=True)["params"], **state}
  _, state = apply_training(norm, x, variables)
  expected = np.asarray(x, np.float64).var(0, ddof=1)
  np.testing.assert_allclose(state["batch_stats"]["var"], expected, rtol=1e-3)


def test_init_does_not_update_statistics():
  variables = BatchNorm().init(jax.random.key(0), activations(), train=True)
  np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
  np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_frozen_batch_norm_constant():
  x, norm = activations(), FrozenBatchNorm()
  variables = norm.init(jax.random.key(0), x)
  assert "params" not in variables
  values = {"mean": 3.0, "var": 4.0, "scale": 2.0, "bias": 1.0}
  variables = {"batch_stats": {k: jnp.full(6, v) for k, v in values.items()}}
  out, state = apply_training(norm, x, variables)
  np.testing.assert_allclose(out, (x - 3) / np.sqrt(4 + 1e-5) * 2 + 1, atol=1e-5)
  for name, value in values.items():
    np.testing.assert_array_equal(state["batch_stats"][name], value)


@pytest.mark.parametrize("kind", ["batch_norm", "frozen_batch_norm", "group_norm"])
def test_norm_factory_signature_and_dtype(kind):
  groups = {"num_groups": 3} if kind == "group_norm" else {}
  norm = norm_factory(kind, dtype="bfloat16")(
    name="norm", scale_init=jax.nn.initializers.zeros, **groups
  )
  x = activations()
  variables = norm.init(jax.random.key(0), x, train=True)
  out, _ = apply_training(norm, x, variables)
  assert out.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  # Zero scales zero a learned norm's output; a frozen norm's scale comes from a checkpoint.
  assert bool(np.any(np.asarray(out, np.float32))) == (kind == "frozen_batch_norm")


def test_unknown_kind_raises():
  with pytest.raises(ValueError, match="did you mean 'batch_norm'"):
    norm_factory("batchnorm")
