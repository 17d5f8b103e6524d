"""Hungarian matching against scipy and the official code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vit_jax_zoo.systems.detr.losses import matching_cost
from vit_jax_zoo.systems.detr.matching import match

solve = jax.jit(match)


def random_problem(rng, batch, queries, targets, scale=5.0):
  """Returns costs and target masks: no target in the first problem, all in the second."""
  cost = (scale * rng.normal(size=(batch, queries, targets))).astype(np.float32)
  is_target = rng.uniform(size=(batch, targets)) < 0.5
  is_target[:2] = False
  is_target[1:2] = True
  return cost, is_target


def assert_optimal(cost, is_target, matching):
  target_of_query, query_of_target = map(np.asarray, matching)
  for i, real in enumerate(is_target):
    indices = np.flatnonzero(real)
    rows, columns = linear_sum_assignment(cost[i][:, indices])
    matched = np.flatnonzero(query_of_target[i] >= 0)
    assert set(matched) <= set(indices)
    assert len(matched) == len(rows)
    queries = query_of_target[i][matched]
    np.testing.assert_array_equal(target_of_query[i][queries], matched)
    assert np.sum(target_of_query[i] >= 0) == len(matched)
    best = cost[i][rows, indices[columns]].astype(np.float64).sum()
    got = cost[i][queries, matched].astype(np.float64).sum()
    assert got == pytest.approx(best, abs=1e-4 * float(np.abs(cost[i]).max()))


@pytest.mark.parametrize(
  ("queries", "targets"), [(1, 1), (1, 5), (7, 1), (9, 7), (7, 9), (30, 30), (100, 20)]
)
def test_matching_cost_equals_scipy(queries, targets):
  rng = np.random.default_rng(queries + targets)
  for scale in (5.0, 1e-3, 1e3):
    cost, is_target = random_problem(rng, 12, queries, targets, scale)
    assert_optimal(cost, is_target, solve(cost, is_target))


@pytest.mark.parametrize("shape", [(2, 5, 0), (2, 0, 5)])
def test_matching_without_queries_or_targets_is_empty(shape):
  matching = match(jnp.zeros(shape), jnp.ones((shape[0], shape[2]), bool))
  assert matching.target_of_query.shape == shape[:2]
  assert np.all(matching.target_of_query == -1)
  assert np.all(matching.query_of_target == -1)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_matching_equals_official_code(load_golden, layer):
  config, inputs, outputs = load_golden("detr_fn_a")
  weights = tuple(config["matcher"][k] for k in ("cost_class", "cost_bbox", "cost_giou"))
  cost = jax.jit(functools.partial(matching_cost, weights=weights))(
    jnp.asarray(inputs["logits"][layer]),
    jnp.asarray(inputs["boxes"][layer]),
    jnp.asarray(inputs["tgt_labels"].astype(np.int32)),
    jnp.asarray(inputs["tgt_boxes"]),
  )
  valid = inputs["tgt_valid"]
  difference = np.abs(cost - outputs[f"match_cost_{layer}"])
  assert difference[np.broadcast_to(valid[:, None], difference.shape)].max() < 1e-5
  matching = solve(cost, valid)
  expected = outputs[f"match_query_to_tgt_{layer}"]
  np.testing.assert_array_equal(matching.target_of_query, expected)


def test_matching_ignores_order_and_padding_of_targets():
  rng = np.random.default_rng(3)
  cost, is_target = random_problem(rng, 8, 9, 12)
  expected = np.asarray(solve(cost, is_target).target_of_query)
  order = rng.permutation(12)
  moved = np.asarray(solve(cost[:, :, order], is_target[:, order]).target_of_query)
  np.testing.assert_array_equal(np.where(moved >= 0, order[moved], -1), expected)
  for filling in (0.0, -1e9, 1e9, np.nan, np.inf, -np.inf):
    filled = np.where(is_target[:, None], cost, filling).astype(np.float32)
    np.testing.assert_array_equal(solve(filled, is_target).target_of_query, expected)


def test_matching_with_non_finite_costs_is_complete():
  rng = np.random.default_rng(4)
  cost = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, 1.0], (16, 8, 8))
  query_of_target = np.asarray(solve(cost.astype(np.float32), np.ones((16, 8), bool))[1])
  np.testing.assert_array_equal(np.sort(query_of_target, axis=1), np.tile(np.arange(8), (16, 1)))


def test_matching_of_ties_is_complete():
  matching = solve(np.zeros((2, 6, 4), np.float32), np.ones((2, 4), bool))
  assert np.all(np.sum(matching.target_of_query >= 0, axis=1) == 4)


def test_matching_accepts_several_batch_axes():
  rng = np.random.default_rng(5)
  cost, is_target = random_problem(rng, 6, 5, 4)
  nested = solve(cost.reshape(2, 3, 5, 4), is_target.reshape(2, 3, 4))
  np.testing.assert_array_equal(
    nested.target_of_query.reshape(6, 5), solve(cost, is_target).target_of_query
  )


@pytest.mark.multidevice
def test_matching_on_devices_needs_no_communication():
  rng = np.random.default_rng(6)
  cost, is_target = random_problem(rng, 8, 9, 5)
  expected = solve(cost, is_target)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), (jax.sharding.AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    placed = jax.device_put((cost, is_target), split)
    compiled = jax.jit(match, in_shardings=(split, split)).lower(*placed).compile()
    got = compiled(*placed)
  np.testing.assert_array_equal(got.target_of_query, expected.target_of_query)
  program = compiled.as_text()
  assert not any(word in program for word in ("all-reduce", "all-gather", "collective-permute"))
