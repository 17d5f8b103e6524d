"""Optimal matching of predictions to targets, on the device, for batches with padded targets.

The linear assignment problem of DETR's loss (arXiv:2005.12872, Eq. 1), solved exactly by successive
shortest paths: the matching grows by one pair at a time, each along the cheapest augmenting path,
found with Dijkstra's algorithm on costs that potentials keep non-negative. It does what
`scipy.optimize.linear_sum_assignment` does on the host.

`optax.assignment.hungarian_algorithm` solves the same problem for whole matrices. Padding would
have to be given a cost there, which changes the result as soon as there is more padding than
targets to spare, or which drowns the true costs in rounding; and padding costs as much time as
targets do. Here padding takes no part: the work is that of the targets that are there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.ops.sharding import on_own_examples

_LARGEST_COST = 1e6  # in place of what is not finite or larger; float32 still resolves 0.06 there


class Matching(NamedTuple):
  """Who is matched with whom, seen from both sides.

  Attributes:
    target_of_query: index of each query's target, -1 for a query without one.
    query_of_target: index of each target's query, -1 for padding, and for targets that were left
      over because there are more of them than queries.
  """

  target_of_query: Int[Array, "*b q"]
  query_of_target: Int[Array, "*b t"]


class _State(NamedTuple):
  """The matching so far, and potentials for which every reduced cost is non-negative."""

  target_of_query: Int[Array, " q"]
  query_of_target: Int[Array, " t"]
  query_potential: Float[Array, " q"]
  target_potential: Float[Array, " t"]


class _Search(NamedTuple):
  """Dijkstra's tables: how far each query is from the free targets, and by way of which target.

  Parents are -1 where the way from the nearest free target is the direct one.
  """

  distance: Float[Array, " q"]
  parent: Int[Array, " q"]
  visited: Bool[Array, " q"]
  nearest: Int[Array, ""]


def match(cost: Float[Array, "*b q t"], is_target: Bool[Array, "*b t"]) -> Matching:
  """Returns the matching of min(queries, targets) pairs whose summed cost is smallest.

  Nothing is differentiated through it. It always ends: costs that are not finite count as very
  large (or very small) ones. Padding, and the order of targets, change nothing but for ties.

  Args:
    cost: of giving target t to query q; float32.
    is_target: False for padding, whose costs are never looked at.

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
  # Each device solves for its own examples: loops over a batch that is spread out would ask all
  # devices, in every round, whether anyone is not done yet.
  return on_own_examples(solve, cost, is_target) if cost.ndim > 2 else solve(cost, is_target)


def _match_one(cost: Float[Array, "t q"], is_target: Bool[Array, " t"]) -> Matching:
  num_targets, num_queries = cost.shape
  nobody = jnp.full(num_queries, -1, jnp.int32), jnp.full(num_targets, -1, jnp.int32)
  if not num_targets or not num_queries:
    return Matching(*nobody)
  # Potentials must be equal among free targets, and zero for free queries: only then does the
  # nearest free query end the cheapest path.
  lowest = jnp.min(cost, initial=_LARGEST_COST, where=is_target[:, None])
  state = _State(*nobody, jnp.zeros(num_queries), jnp.full(num_targets, lowest))
  pairs = jnp.minimum(jnp.sum(is_target), num_queries)
  state = jax.lax.fori_loop(0, pairs, lambda _, s: _augment(cost, is_target, s), state)
  return Matching(state.target_of_query, state.query_of_target)


def _augment(cost: Float[Array, "t q"], is_target: Bool[Array, " t"], state: _State) -> _State:
  """Adds one pair to the matching, along the cheapest path from a free target to a free query.

  Under `vmap` it also runs for problems that are solved already while others of the batch are not;
  what it returns is dropped then, but its loops must end: nothing is reached from no free target.
  """
  free = is_target & (state.query_of_target < 0)
  search = jax.lax.while_loop(
    lambda s: (state.target_of_query[s.nearest] >= 0) & jnp.isfinite(s.distance[s.nearest]),
    lambda s: _step(cost, state, s),
    _start(cost, free, state),
  )
  length = search.distance[search.nearest]
  # What lies nearer than the path is long moves up to it: the path then costs nothing.
  gain = jnp.where(search.visited, length - search.distance, 0.0)
  matched = state.query_of_target >= 0
  target_gain = jnp.where(matched, gain[state.query_of_target], jnp.where(free, length, 0.0))
  target_of_query, query_of_target = _flip_path(cost, free, search, state)
  return _State(
    target_of_query,
    query_of_target,
    state.query_potential - gain,
    state.target_potential + target_gain,
  )


def _start(cost: Float[Array, "t q"], free: Bool[Array, " t"], state: _State) -> _Search:
  """Reaches every query from the free targets directly."""
  # The only work on the whole matrix: a plain minimum, many times faster than an argmin on CPUs.
  cheapest = jnp.min(jnp.where(free[:, None], cost, jnp.inf), axis=0)
  level = jnp.max(jnp.where(free, state.target_potential, -jnp.inf))  # the same for all of them
  distance = cheapest - level - state.query_potential
  nowhere, unseen = jnp.full(distance.shape, -1, jnp.int32), jnp.zeros(distance.shape, bool)
  return _Search(distance, nowhere, unseen, jnp.argmin(distance))


def _step(cost: Float[Array, "t q"], state: _State, search: _Search) -> _Search:
  """Goes on from the nearest query: over to its target, and from there to all other queries."""
  here = search.distance[search.nearest]
  visited = search.visited.at[search.nearest].set(True)
  target = state.target_of_query[search.nearest]
  reduced = cost[target] - state.target_potential[target] - state.query_potential
  shorter = ~visited & (here + reduced < search.distance)
  distance = jnp.where(shorter, here + reduced, search.distance)
  nearest = jnp.argmin(jnp.where(visited, jnp.inf, distance))
  return _Search(distance, jnp.where(shorter, target, search.parent), visited, nearest)


def _flip_path(
  cost: Float[Array, "t q"], free: Bool[Array, " t"], search: _Search, state: _State
) -> tuple[Int[Array, " q"], Int[Array, " t"]]:
  """Gives the path's end to its parent, that one's old query to the next, back to the start."""

  def flip(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    query, target_of_query, query_of_target = carry
    direct = jnp.argmin(jnp.where(free, cost[:, query], jnp.inf))
    target = jnp.where(search.parent[query] < 0, direct, search.parent[query])
    return (
      query_of_target[target],
      target_of_query.at[query].set(target),
      query_of_target.at[target].set(query),
    )

  end = jnp.where(jnp.isfinite(search.distance[search.nearest]), search.nearest, -1)
  start = (end, state.target_of_query, state.query_of_target)
  return jax.lax.while_loop(lambda carry: carry[0] >= 0, flip, start)[1:]
