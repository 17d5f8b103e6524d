"""Exact bipartite matching on the accelerator, for batches with padded targets.

Successive shortest paths for Eq. 1 of arXiv:2005.12872: the matching grows by one pair at a time
along the cheapest augmenting path, found with Dijkstra's algorithm on costs that potentials keep
non-negative. In `optax.assignment.hungarian_algorithm` padding would need a cost, which changes the
result or loses true costs in rounding, and would take as much time as targets.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.ops.sharding import on_own_examples

_LARGEST_COST = 1e6  # replaces larger and non-finite costs; float32 resolves 0.06 there


class Matching(NamedTuple):
  """Indices of matched pairs: -1 for queries without a target, for padding and excess targets."""

  target_of_query: Int[Array, "*b q"]
  query_of_target: Int[Array, "*b t"]


class _State(NamedTuple):
  """A matching, and potentials for which every reduced cost is non-negative."""

  target_of_query: Int[Array, " q"]
  query_of_target: Int[Array, " t"]
  query_potential: Float[Array, " q"]
  target_potential: Float[Array, " t"]


class _Search(NamedTuple):
  """Dijkstra's tables."""

  distance: Float[Array, " q"]  # from the free targets
  parent: Int[Array, " q"]  # target before the query; -1 if the path from a free target is direct
  visited: Bool[Array, " q"]
  nearest: Int[Array, ""]


def match(cost: Float[Array, "*b q t"], is_target: Bool[Array, "*b t"]) -> Matching:
  """Returns the min(queries, targets) pairs of minimum total cost. Not differentiable.

  Non-finite costs are replaced by very large (or small) ones. Padding and the order of targets
  affect only ties.

  >>> cost = jnp.array([[3.0, 1.0], [1.0, 2.0], [0.0, 0.0]])
  >>> match(cost, jnp.array([True, False])).target_of_query
  Array([-1, -1,  0], dtype=int32)
  """
  solve = _match_one
  for _ in range(cost.ndim - 2):
    solve = jax.vmap(solve)
  cost = jnp.swapaxes(jax.lax.stop_gradient(cost), -1, -2).astype(jnp.float32)
  cost = jnp.nan_to_num(cost, nan=_LARGEST_COST, posinf=_LARGEST_COST, neginf=-_LARGEST_COST)
  cost = jnp.clip(cost, -_LARGEST_COST, _LARGEST_COST)
  # Each device solves for its own examples: loops over a sharded batch would synchronise all
  # devices in every iteration.
  return on_own_examples(solve, cost, is_target) if cost.ndim > 2 else solve(cost, is_target)


def _match_one(cost: Float[Array, "t q"], is_target: Bool[Array, " t"]) -> Matching:
  num_targets, num_queries = cost.shape
  none = jnp.full(num_queries, -1, jnp.int32), jnp.full(num_targets, -1, jnp.int32)
  if not num_targets or not num_queries:
    return Matching(*none)
  # Potentials must be equal among free targets, and zero for free queries: only then does the
  # nearest free query end the cheapest path.
  lowest = jnp.min(cost, initial=_LARGEST_COST, where=is_target[:, None])
  state = _State(*none, jnp.zeros(num_queries, cost.dtype), jnp.full(num_targets, lowest))
  pairs = jnp.minimum(jnp.sum(is_target), num_queries)
  state = jax.lax.fori_loop(0, pairs, lambda _, s: _augment(cost, is_target, s), state)
  return Matching(state.target_of_query, state.query_of_target)


def _augment(cost: Float[Array, "t q"], is_target: Bool[Array, " t"], state: _State) -> _State:
  """Adds one pair to the matching, along the cheapest path from a free target to a free query.

  Under `vmap` it also runs for problems that are already solved; the result is discarded, but the
  loops must end: without a free target all distances are infinite.
  """
  free = is_target & (state.query_of_target < 0)
  # The only pass over the whole matrix: a minimum, many times faster than an argmin on CPUs.
  cheapest = jnp.min(jnp.where(free[:, None], cost, jnp.inf), axis=0)
  level = jnp.max(jnp.where(free, state.target_potential, -jnp.inf))  # the same for all of them
  distance = cheapest - level - state.query_potential
  no_parent, unvisited = jnp.full(distance.shape, -1, jnp.int32), jnp.zeros(distance.shape, bool)
  search = jax.lax.while_loop(
    lambda s: (state.target_of_query[s.nearest] >= 0) & jnp.isfinite(s.distance[s.nearest]),
    lambda s: _step(cost, state, s),
    _Search(distance, no_parent, unvisited, jax.lax.argmin(distance, 0, jnp.int32)),
  )
  length = search.distance[search.nearest]
  # Raises nearer potentials to the path's length: its reduced cost becomes zero.
  gain = jnp.where(search.visited, length - search.distance, 0.0)
  matched = state.query_of_target >= 0
  target_gain = jnp.where(matched, gain[state.query_of_target], jnp.where(free, length, 0.0))
  potentials = state.query_potential - gain, state.target_potential + target_gain
  return _State(*_flip_path(cost, free, search, state), *potentials)


def _step(cost: Float[Array, "t q"], state: _State, search: _Search) -> _Search:
  """Visits the nearest query: relaxes the distances of all others by way of its target."""
  here = search.distance[search.nearest]
  visited = search.visited.at[search.nearest].set(True)
  target = state.target_of_query[search.nearest]
  reduced = cost[target] - state.target_potential[target] - state.query_potential
  shorter = ~visited & (here + reduced < search.distance)
  distance = jnp.where(shorter, here + reduced, search.distance)
  nearest = jax.lax.argmin(jnp.where(visited, jnp.inf, distance), 0, jnp.int32)
  return _Search(distance, jnp.where(shorter, target, search.parent), visited, nearest)


def _flip_path(
  cost: Float[Array, "t q"], free: Bool[Array, " t"], search: _Search, state: _State
) -> tuple[Int[Array, " q"], Int[Array, " t"]]:
  """Flips the matching along the path, from its end to its start."""

  def flip(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    query, target_of_query, query_of_target = carry
    direct = jax.lax.argmin(jnp.where(free, cost[:, query], jnp.inf), 0, jnp.int32)
    target = jnp.where(search.parent[query] < 0, direct, search.parent[query])
    flipped = target_of_query.at[query].set(target), query_of_target.at[target].set(query)
    return query_of_target[target], *flipped

  end = jnp.where(jnp.isfinite(search.distance[search.nearest]), search.nearest, -1)
  start = (end, state.target_of_query, state.query_of_target)
  return jax.lax.while_loop(lambda carry: carry[0] >= 0, flip, start)[1:]
