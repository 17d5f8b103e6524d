"""Texture search and transfer against the official algorithm on all patches and pairs."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from tests.half_precision import bfloat16_errors
from vit_jax_zoo.systems.ttsr.losses import VGG19
from vit_jax_zoo.systems.ttsr.search import Match, find_matches, relevance_of, transfer

HIGHEST = jax.lax.Precision.HIGHEST


def unfold(maps, scale=1):
  """Returns all patches of 3x3 cells as `[b positions pixels c]`, with zero padding."""
  size = 3 * scale
  padded = jnp.pad(maps, ((0, 0), (scale, scale), (scale, scale), (0, 0)))
  rows, columns = maps.shape[1] // scale, maps.shape[2] // scale
  patches = [
    padded[:, scale * i : scale * i + size, scale * j : scale * j + size]
    for i in range(rows)
    for j in range(columns)
  ]
  return jnp.stack(patches, axis=1).reshape(maps.shape[0], rows * columns, size**2, -1)


@functools.partial(jax.jit, static_argnames="divide_last")
def full_matrix_match(queries, references, divide_last=False):
  """Divides patches first, as the official code; `divide_last` keeps products of integers exact."""
  asked, known = (
    unfold(maps).reshape(maps.shape[0], maps.shape[1] * maps.shape[2], -1)
    for maps in (queries, references)
  )
  ours, theirs = (
    jax.lax.rsqrt(jnp.maximum(jnp.sum(patches**2, axis=-1), 1e-24)) for patches in (asked, known)
  )
  if not divide_last:
    asked, known = asked * ours[..., None], known * theirs[..., None]
  matrix = jnp.einsum("bqk,brk->bqr", asked, known, precision=HIGHEST)
  if divide_last:
    matrix = matrix * theirs[:, None] * ours[..., None]
  shape = queries.shape[:3]
  return Match(
    jnp.argmax(matrix, axis=-1).astype(jnp.int32).reshape(shape),
    jnp.max(matrix, axis=-1).reshape(shape),
  )


def gather_and_fold(reference, index, scale=1):
  batch, height, width = index.shape
  patches = unfold(reference, scale)
  chosen = jax.vmap(lambda p, i: p[i.reshape(-1)])(patches, index)
  chosen = chosen.reshape(batch, height, width, 3 * scale, 3 * scale, -1)
  folded = jnp.zeros((batch, (height + 2) * scale, (width + 2) * scale, reference.shape[-1]))
  for y in range(height):
    for x in range(width):
      rows = slice(y * scale, (y + 3) * scale)
      folded = folded.at[:, rows, x * scale : (x + 3) * scale].add(chosen[:, y, x])
  return folded[:, scale:-scale, scale:-scale] / 9


def random_maps(seed=0, integers=False):
  """Returns queries and larger references; with `integers`, products are exact and often tied."""
  rng = np.random.default_rng(seed)
  shapes = (2, 4, 5, 3), (2, 6, 4, 3)
  if integers:
    return [jnp.asarray(rng.integers(0, 2, s), jnp.float32) for s in shapes]
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def tied_maps():
  """Returns references tiled from 2x2 cells, so that every match has ties, and empty ones."""
  queries, references = random_maps(1, integers=True)
  tiled = jnp.tile(references[:, :2, :2], (1, 4, 3, 1))
  return queries, tiled.at[1, :, 4:].set(0)


find = functools.partial(jax.jit, static_argnames="block_size")(find_matches)


@pytest.mark.parametrize(
  ("ties", "block_size"),
  [(True, (1, 1)), (False, (3, 5)), (True, (7, 24)), (False, (28, 36)), (True, (1000, 1000))],
)
def test_search_equals_full_matrix_for_every_block_size(ties, block_size):
  queries, references = tied_maps() if ties else random_maps()
  expected = full_matrix_match(queries, references, divide_last=ties)
  match = find(queries, references, block_size=block_size)
  np.testing.assert_array_equal(match.index, expected.index)
  np.testing.assert_allclose(match.relevance, expected.relevance, atol=1e-6)
  assert match.relevance.dtype == jnp.float32


def test_search_of_ties_returns_first_match():
  queries, references = tied_maps()
  best = find(queries, references, block_size=(3, 4))
  repeated = find(queries, jnp.concatenate([references, 0 * references[:, :1], references], axis=1))
  inner = best.index[0] // 6 < 7  # the neighbours of the last row of patches have changed
  np.testing.assert_array_equal(repeated.index[0][inner], best.index[0][inner])
  empty = find(queries, jnp.zeros_like(references), block_size=(3, 4))
  np.testing.assert_array_equal(empty.index, 0)
  np.testing.assert_array_equal(empty.relevance, 0)


def test_gradients_equal_full_matrix():
  queries, references = random_maps(2)
  weights = jnp.asarray(np.random.default_rng(3).normal(size=queries.shape[:3]), jnp.float32)

  def total(match, queries, references):
    return jnp.sum(weights * match(queries, references).relevance)

  small = functools.partial(find_matches, block_size=(6, 7))
  ours, plain = (
    jax.jit(jax.grad(functools.partial(total, match), argnums=(0, 1)))(queries, references)
    for match in (small, full_matrix_match)
  )
  for a, b in zip(ours, plain, strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_gradients_of_empty_patches_are_finite():
  queries, references = random_maps()
  empty = jnp.zeros_like(references)
  gradients = jax.jit(jax.grad(lambda q, r: jnp.sum(find_matches(q, r).relevance), argnums=(0, 1)))
  assert all(np.isfinite(g).all() for g in gradients(queries, empty))
  assert all(np.isfinite(g).all() for g in gradients(jnp.zeros_like(queries), references))


@pytest.mark.parametrize("scale", [1, 2])
def test_transfer_equals_gather_and_fold(scale):
  rng = np.random.default_rng(4)
  index = jnp.asarray(rng.integers(0, 6 * 4, (2, 4, 5)), jnp.int32)
  reference = jnp.asarray(rng.normal(size=(2, 6 * scale, 4 * scale, 3)), jnp.float32)
  weights = jnp.asarray(rng.normal(size=(2, 4 * scale, 5 * scale, 3)), jnp.float32)

  def ours(reference):
    return transfer(reference, index, grid_width=4, scale=scale)

  plain = functools.partial(gather_and_fold, index=index, scale=scale)
  (result, gradient), (expected, expected_gradient) = (
    jax.jit(lambda r, f=f: jax.vjp(f, r)[0:1] + jax.vjp(f, r)[1](weights))(reference)
    for f in (ours, plain)
  )
  np.testing.assert_allclose(result, expected, atol=1e-6)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_transfer_from_self_reconstructs_image():
  maps, _ = random_maps(5)
  match = find(maps, maps)
  np.testing.assert_array_equal(match.index[0], np.arange(20).reshape(4, 5))
  np.testing.assert_allclose(match.relevance, 1, atol=1e-6)
  rebuilt = jax.jit(functools.partial(transfer, grid_width=5))(maps, match.index)
  np.testing.assert_allclose(rebuilt[:, 1:-1, 1:-1], maps[:, 1:-1, 1:-1], atol=1e-6)
  np.testing.assert_allclose(rebuilt[:, 0, 0], maps[:, 0, 0] * 4 / 9, atol=1e-6)


def test_search_of_bfloat16_maps_computes_in_float32():
  queries, references = (x.astype(jnp.bfloat16) for x in random_maps(6))
  expected = full_matrix_match(queries.astype(jnp.float32), references.astype(jnp.float32))
  match = find(queries, references)
  np.testing.assert_array_equal(match.index, expected.index)
  np.testing.assert_allclose(match.relevance, expected.relevance, atol=1e-6)


def precisions(function, *inputs):
  """Returns the precision of every matrix product and convolution, including nested functions."""

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name in ("dot_general", "conv_general_dilated"):
        yield equation.params["precision"]
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from walk(inner)

  # The low default of TPUs must not affect the selection of matches; on a CPU it has no effect.
  with jax.default_matmul_precision("bfloat16"):
    return list(walk(jax.make_jaxpr(function)(*inputs).jaxpr))


def test_search_uses_highest_matmul_precision():
  specified = precisions(find_matches, *random_maps(6))
  images = jnp.zeros((1, 8, 8, 3))
  extractor = VGG19(outputs=("relu2_1",), widths=(4, 4), dtype="bfloat16")
  variables = jax.eval_shape(extractor.init, jax.random.key(0), images)
  specified += precisions(functools.partial(extractor.apply, precise=True), variables, images)
  assert len(specified) >= 4
  assert all(precision == (HIGHEST, HIGHEST) for precision in specified)
  unspecified = precisions(extractor.apply, variables, images)
  assert not any(precision == (HIGHEST, HIGHEST) for precision in unspecified)


def test_relevance_of_other_index_is_lower():
  queries, references = random_maps(7)
  index = jnp.zeros(queries.shape[:3], jnp.int32)
  relevance = jax.jit(relevance_of)(queries, references, index)
  assert np.all(relevance < find(queries, references).relevance)


def temporary_bytes(size, **kwargs):
  """Returns the compiled temporary memory of a search and a transfer with gradients."""
  maps = jax.ShapeDtypeStruct((1, size, size, 8), jnp.float32)
  fine = jax.ShapeDtypeStruct((1, 2 * size, 2 * size, 8), jnp.float32)

  def total(queries, references, fine):
    match = find_matches(queries, references, **kwargs)
    return jnp.sum(match.relevance) + jnp.sum(transfer(fine, match.index, grid_width=size, scale=2))

  compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(maps, maps, fine).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_image_size():
  block = (64, 64)
  small, large = (temporary_bytes(size, block_size=block) for size in (32, 128))
  assert large < 16 * 1.1 * small
  assert large < 128**4 * 4 / 20  # the full similarity matrix


def test_invalid_inputs_raise():
  queries, references = random_maps()
  with pytest.raises(ValueError, match="block_size: "):
    find_matches(queries, references, block_size=(0, 3))
  with pytest.raises(ValueError, match=r"reference: .* width is 4"):
    transfer(references, jnp.zeros((2, 4, 5), jnp.int32), grid_width=4, scale=2)


def test_search_in_full_hd_reference_needs_at_most_four_gigabytes():
  """480x270 with a 1920x1080 reference: the full similarity matrix would take 67 GB."""
  maps = jax.ShapeDtypeStruct((1, 270, 480, 256), jnp.float32)
  levels = [
    jax.ShapeDtypeStruct((1, 270 * s, 480 * s, c), jnp.float32)
    for s, c in ((1, 256), (2, 128), (4, 64))
  ]

  def search(queries, references, *levels):
    match = find_matches(queries, references)
    scales = (1, 2, 4)
    return match, [
      transfer(x, match.index, grid_width=480, scale=s) for x, s in zip(levels, scales, strict=True)
    ]

  memory = jax.jit(search).lower(maps, maps, *levels).compile().memory_analysis()
  everything = (
    memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  )
  assert memory.temp_size_in_bytes < 1.1e9
  assert everything < 4e9


def test_bfloat16_gradients_of_repeated_patches_are_near_float32():
  reference = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
  index = jax.random.randint(jax.random.key(1), (1, 48, 48), 0, 4)  # only four patches
  laid_out = functools.partial(transfer, index=index, grid_width=8)
  assert max(bfloat16_errors(laid_out, reference)) < 0.01
  queries = jax.random.uniform(jax.random.key(2), (1, 48, 48, 4))
  relevance = functools.partial(relevance_of, index=index)
  assert max(bfloat16_errors(relevance, queries, reference)) < 0.01
