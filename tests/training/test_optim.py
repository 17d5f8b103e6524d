"""Optimizers: update formulas, per-parameter rules, state size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from tests.trees import flatten_paths
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.optim import OPTIMIZERS, create_optimizer


def make_params():
  """Scanned blocks, a head, and values that adding zero could change bitwise."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    "encoder": {
      "blocks": {
        "query": {"kernel": normal(2, 8, 2, 4), "bias": normal(2, 2, 4)},
        "norm": {"scale": normal(2, 8), "gamma": normal(2, 8)},
      },
      "position_embedding": normal(1, 5, 8),
    },
    "head": {"kernel": normal(8, 3), "bias": jnp.asarray([-0.0, 1e-40, np.nan], jnp.float32)},
  }


FREEZE_BIAS = ("head/bias", {"frozen": True})


def gradients(params, step):
  """Returns deterministic gradients of about unit size."""
  leaves, structure = jax.tree.flatten(params)
  rng = np.random.default_rng(step)
  return structure.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


def run(optimizer, params, steps, grads=gradients):
  """Applies jitted updates, as in the training step."""

  @jax.jit
  def update(params, state, grads):
    updates, state = optimizer.tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.jit(optimizer.tx.init)(params)
  for step in range(steps):
    params, state = update(params, state, grads(params, step))
  return params, state


def create(params, *, num_steps=10, **config):
  return create_optimizer({"learning_rate": 0.01, **config}, params, num_steps)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_reduce_loss_frozen_unchanged(name):
  params = make_params()
  optimizer = create(params, name=name, rules=[FREEZE_BIAS], learning_rate=0.1, num_steps=100)
  target = gradients(params, 99)

  @jax.jit
  def distance(params):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
    return sum(jnp.nansum((p - t) ** 2) for p, t in pairs)

  gradient = jax.jit(jax.grad(distance))
  moved, state = run(optimizer, params, 60, grads=lambda p, _: gradient(p))
  assert distance(moved) < 0.5 * distance(params)
  before, after = params["head"]["bias"], moved["head"]["bias"]
  np.testing.assert_array_equal(np.asarray(before).view(np.int32), np.asarray(after).view(np.int32))
  assert not [p for p in flatten_paths(state) if p.endswith("head/bias")], "no memory"
  assert optimizer.frozen["head"] == {"kernel": False, "bias": True}


def test_stop_frozen_gradients_zero():
  params = {"head": make_params()["head"]}
  optimizer = create(params, name="sgd", rules=[FREEZE_BIAS])

  def loss(params):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(optimizer.stop_frozen(params)))

  grads = jax.grad(loss)(params)
  assert not np.any(grads["head"]["bias"])
  assert np.all(grads["head"]["kernel"] == 1)


# The settings of a timm ViT's reference training curve: torch's AdamW after torch's clipping.
ADAMW = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05, "clip_norm": 1.0}


def test_adamw_equals_torch_formula():
  params = {"kernel": gradients({"x": jnp.ones((4, 3))}, 7)["x"], "bias": jnp.ones(3)}
  found, _ = run(create(params, **ADAMW), params, 6)
  p = {key: np.asarray(value, np.float64) for key, value in params.items()}
  m = {key: np.zeros_like(value) for key, value in p.items()}
  v = {key: np.zeros_like(value) for key, value in p.items()}
  for t in range(6):
    grads = {key: np.asarray(g, np.float64) for key, g in gradients(params, t).items()}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for key in p:
      g = grads[key] * min(1.0, 1.0 / (norm + 1e-6))
      p[key] *= 1 - 1e-3 * (0.05 if p[key].ndim > 1 else 0.0)
      m[key] = 0.9 * m[key] + 0.1 * g
      v[key] = 0.999 * v[key] + 0.001 * g**2
      mean, variance = m[key] / (1 - 0.9 ** (t + 1)), v[key] / (1 - 0.999 ** (t + 1))
      p[key] -= 1e-3 * mean / (np.sqrt(variance) + 1e-8)
  for key, expected in p.items():
    np.testing.assert_allclose(found[key], expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_torch_formula(nesterov):
  params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
  config = {"name": "sgd", "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
  found, _ = run(create(params, **config), params, 5)
  for key, value in params.items():
    p = np.asarray(value, np.float64)
    buffer = np.zeros_like(p)
    for t in range(5):
      g = np.asarray(gradients(params, t)[key], np.float64) + (0.1 * p if p.ndim > 1 else 0.0)
      buffer = 0.9 * buffer + g
      p = p - 0.01 * (g + 0.9 * buffer if nesterov else buffer)
    np.testing.assert_allclose(found[key], p, rtol=2e-6, atol=1e-7)


def test_bfloat16_accumulators():
  params = {"kernel": jnp.ones((4, 3))}
  for config in (
    {"name": "sgd", "momentum": 0.9, "accumulator_dtype": "bfloat16"},
    {"name": "adam", "mu_dtype": "bfloat16"},
    {"name": "adafactor"},
  ):
    moved, state = run(create(params, **config), params, 2)
    assert moved["kernel"].dtype == jnp.float32
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (4, 3)]
    assert jnp.bfloat16 in dtypes


def test_fully_decoupled_decay_independent_of_base_rate():
  params = {"kernel": jnp.full((2, 2), 8.0), "bias": jnp.full(2, 8.0)}
  zero_gradients = jax.tree.map(jnp.zeros_like, params)
  for rate in (0.1, 1e-4):
    optimizer = create(
      params, name="adam", learning_rate=rate, weight_decay=0.5,
      weight_decay_mode="fully_decoupled", schedule={"name": "linear"}, num_steps=4,
      rules=[("kernel", {"learning_rate": 0.1})],
    )  # fmt: skip
    found, _ = run(optimizer, params, 4, grads=lambda *_: zero_gradients)
    shape = np.array([1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(found["kernel"], 8.0 * np.prod(1 - 0.5 * shape), rtol=1e-5)
    np.testing.assert_array_equal(found["bias"], 8.0)


def test_decoupled_decay_scaled_by_rate_and_multiplier():
  params = {"kernel": jnp.full((2, 2), 8.0)}
  optimizer = create(
    params, name="adamw", learning_rate=0.1, weight_decay=0.5,
    rules=[("kernel", {"learning_rate": 0.2})],
  )  # fmt: skip
  found, _ = run(optimizer, params, 1, grads=lambda p, _: jax.tree.map(np.zeros_like, p))
  np.testing.assert_allclose(found["kernel"], 8.0 * (1 - 0.1 * 0.2 * 0.5), rtol=1e-6)


def test_adafactor_equals_optax():
  params = {"kernel": gradients({"x": jnp.ones((130, 140))}, 1)["x"]}
  ours = create(
    params, name="adafactor", learning_rate=0.1, beta2_cap=1.0, min_dim_size_to_factor=128,
    momentum=None,
  )  # fmt: skip
  found, state = run(ours, params, 3)
  assert max(leaf.size for leaf in jax.tree.leaves(state)) == 140, "factored"
  theirs = optax.adafactor(
    0.1, clipping_threshold=None, multiply_by_parameter_scale=False, momentum=None
  )
  expected, state = params, theirs.init(params)
  update = jax.jit(theirs.update)
  for step in range(3):
    updates, state = update(gradients(params, step), state, expected)
    expected = optax.apply_updates(expected, updates)
  np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-5, atol=1e-6)


def decayed(params, **config):
  """Returns the paths of parameters that weight decay reduces."""
  optimizer = create(params, name="adamw", weight_decay=0.5, **config)
  ones = jax.tree.map(np.ones_like, params)
  found, _ = run(optimizer, ones, 1, grads=lambda p, _: jax.tree.map(np.zeros_like, p))
  return {path for path, leaf in flatten_paths(found).items() if np.max(leaf) < 1.0}


def test_default_decay_matrices_only():
  assert decayed(make_params()) == {
    "encoder/blocks/query/kernel", "encoder/position_embedding", "head/kernel",
  }  # fmt: skip


def test_scanned_and_unrolled_layers_decay_equally():
  block = {"query": {"kernel": np.ones((8, 2, 4)), "bias": np.ones((2, 4))},
           "norm": {"scale": np.ones(8), "gamma": np.ones(8)}}  # fmt: skip
  stacked = jax.tree.map(lambda x: np.stack([x, x]), block)
  assert decayed({"blocks": stacked}) == {"blocks/query/kernel"}
  assert decayed({"blocks_0": block}) == {"blocks_0/query/kernel"}
  assert decayed({"blocks": {"0": block}}) == {"blocks/0/query/kernel"}


def test_rules_override_decay():
  kernels = [(".*/kernel", {"weight_decay": 1.0}), (".*", {"weight_decay": 0.0})]
  assert decayed(make_params(), rules=kernels) == {"encoder/blocks/query/kernel", "head/kernel"}
  everything = decayed(make_params(), rules=[(".*", {"weight_decay": 1.0})])
  assert len(everything) == 7


def test_first_matching_rule_wins_per_setting():
  params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
  rules = [
    ("a/.*", {"learning_rate": 0.5}),
    (".*", {"learning_rate": 0.1, "weight_decay": 0.0}),
    ("b/.*", {"learning_rate": 7.0}),
  ]
  config = ConfigDict({"name": "sgd", "learning_rate": 1.0, "weight_decay": 3.0})
  config.rules = rules
  optimizer = create_optimizer(config, params, 10)
  found, _ = run(optimizer, params, 1, grads=lambda p, _: jax.tree.map(np.ones_like, p))
  np.testing.assert_allclose(found["a"]["kernel"], 0.5)
  np.testing.assert_allclose(found["b"]["kernel"], 0.9, rtol=1e-6)


def test_frozen_gradients_excluded_from_clip_norm():
  params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
  grads = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([1e6, 1e6])}
  optimizer = create(
    params, name="sgd", learning_rate=1.0, clip_norm=1.0, rules=[("b", {"frozen": True})]
  )
  updates, _ = optimizer.tx.update(grads, optimizer.tx.init(params), params)  # before freezing
  np.testing.assert_allclose(updates["a"], [-0.6, -0.8], rtol=1e-6)
  np.testing.assert_array_equal(updates["b"], 0.0)


def test_begin_step_delays_warmup():
  config = {"name": "sgd", "learning_rate": 1.0,
            "schedule": {"name": "linear", "warmup_steps": 2}}  # fmt: skip
  params = {"x": jnp.zeros(1)}
  optimizer = create_optimizer(config, params, 10, begin_step=4, updates=2)
  assert [float(optimizer.schedule(step)) for step in (0, 3, 4, 5, 6, 8, 10)] == pytest.approx(
    [0, 0, 0, 0.5, 1.0, 0.5, 0.0]
  )
  found, _ = run(optimizer, params, 6, grads=lambda p, _: jax.tree.map(np.ones_like, p))
  np.testing.assert_allclose(found["x"], [-(0 + 0 + 0.5 + 0.5 + 1.0 + 1.0)], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "lamb", "lion"])
def test_state_sharded_like_parameters(name):
  params = make_params()
  momentum = {"momentum": 0.9} if name == "sgd" else {}
  optimizer = create(params, name=name, clip_norm=1.0, rules=[FREEZE_BIAS], **momentum)
  specs = jax.tree.map(lambda p: P(*([None] * (p.ndim - 1)), "fsdp"), params)
  state = jax.eval_shape(optimizer.tx.init, params)
  found_specs = flatten_paths(sharding.specs_like_parameters(state, params, specs))
  split = [path for path, spec in found_specs.items() if spec != P()]
  moments = {"adamw": 2, "lamb": 2, "adafactor": 2, "sgd": 1, "lion": 1}[name]
  assert len(split) == 6 * moments
  assert all(found_specs[path] == P() for path in found_specs if path.endswith("count"))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"name": "adanw"}, "'adanw'.*'adamw'"),
    ({"name": "adam", "beta1": 0.9}, "optimizer adam 'beta1'"),
    ({"name": "sgd", "momentun": 0.9}, "'momentun'.*'momentum'"),
    ({"name": "sgd", "weight_decay_mode": "L2"}, "weight_decay_mode 'L2'.*'l2'"),
    ({"name": "sgd", "clip_norm": 0.0}, "clip_norm: 0.0"),
    ({"name": "adam", "b1": 2}, r"optimizer\.b1: 2; .*\[0, 1\)"),
    ({"name": "adam", "eps": -1.0}, r"optimizer\.eps: -1\.0"),
    ({"name": "sgd", "weight_decay": -0.1}, r"optimizer\.weight_decay: -0\.1"),
    ({"name": "sgd", "rules": [("heads/.*", {"frozen": True})]},
     r"rule 'heads/\.\*': .* head/"),
    ({"name": "sgd", "rules": [("head/.*", {"lr": 0.1})]}, "rule 'head/.*': 'lr'"),
    ({"name": "sgd", "rules": ["head"]}, "not a pair"),
    ({"name": "sgd", "rules": [("(", {"frozen": True})]}, "not a regular expression"),
    ({"name": "sgd", "rules": [(".*", {"frozen": True})]}, r"optimizer\.rules"),
    ({}, "optimizer: no 'name'"),
    ({"name": "adam", "weight_decay": 0.1, "weight_decay_mode": "fully_decoupled",
      "learning_rate": 0.0}, "learning_rate: 0"),
  ],
)  # fmt: skip
def test_invalid_config_raises(config, message):
  with pytest.raises(ValueError, match=message) as error:
    create(make_params(), **config)
  assert "\n" not in str(error.value)
