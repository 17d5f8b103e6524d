"""Color quantization: tokens equal OpenAI's and Hugging Face's; palettes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.igpt import palette
from vit_jax_zoo.systems.igpt.palette import (
  cluster_colors,
  nearest_cluster,
  spread_clusters,
)


def decode(tokens, clusters):
  return np.asarray(cluster_colors(jnp.asarray(tokens), jnp.asarray(clusters)))


@pytest.mark.parametrize("name", ["igpt_losses_a", "imagegpt_a"])
def test_tokens_and_colors_equal_reference(load_golden, name):
  _, inputs, outputs = load_golden(name)
  image, clusters = np.atleast_3d(inputs["image"]), inputs["clusters"]
  images = image if image.ndim == 4 else image[None]
  tokens = outputs.get("quantised", outputs.get("quantised_same_size"))
  tokens = tokens.reshape(len(images), -1)
  encode = jax.jit(lambda x: nearest_cluster(normalize_images(x), jnp.asarray(clusters)))
  np.testing.assert_array_equal(encode(images).reshape(tokens.shape), tokens)
  host = palette.encode(images, clusters)
  np.testing.assert_array_equal(host.reshape(tokens.shape), tokens)
  colors = outputs.get("decoded", outputs.get("decoded_same_size")).reshape(images.shape)
  np.testing.assert_array_equal(decode(host, clusters), colors)


def test_encode_returns_first_nearest_cluster():
  rng = np.random.default_rng(0)
  clusters = rng.uniform(-1, 1, (64, 3)).astype(np.float32)
  clusters[40] = clusters[7]
  images = rng.integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
  images[0, 0, 0] = decode(np.array(40), clusters)
  pixels = images.astype(np.float64) / 127.5 - 1
  distances = np.square(pixels[..., None, :] - clusters).sum(-1)
  expected = distances.argmin(-1)
  assert expected[0, 0, 0] == 7
  np.testing.assert_array_equal(palette.encode(images, clusters), expected)
  ours = nearest_cluster(jnp.asarray(pixels, jnp.float32), jnp.asarray(clusters))
  np.testing.assert_array_equal(ours, expected)


def test_nearest_cluster_makes_no_pixels_by_colors_by_channels_array():
  shapes = (
    jax.ShapeDtypeStruct((4, 32, 32, 3), np.float32),
    jax.ShapeDtypeStruct((512, 3), np.float32),
  )
  jaxpr = jax.make_jaxpr(nearest_cluster)(*shapes).jaxpr
  largest = max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)
  assert largest == 4 * 32 * 32 * 512
  assert not any(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)


def test_spread_clusters_cover_color_cube():
  colors = spread_clusters(512)
  assert colors.shape == (512, 3)
  assert np.abs(colors).max() <= 1
  corners = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
  gaps = np.linalg.norm(corners[:, None] - colors, axis=-1).min(axis=1)
  assert gaps.max() < 0.4
  octants, counts = np.unique(colors > 0, axis=0, return_counts=True)
  assert len(octants) == 8
  assert counts.min() > 48


def test_fit_palette_of_few_colors_is_exact():
  colors = np.array([[255, 255, 255], [0, 0, 0], [200, 10, 10]], np.uint8)
  images = colors[np.random.default_rng(0).integers(0, 3, (4, 6, 6))]
  fitted = palette.fit_palette(images, 3)
  np.testing.assert_array_equal(decode(np.arange(3), fitted), colors[[1, 2, 0]])
  np.testing.assert_array_equal(decode(palette.encode(images, fitted), fitted), images)


def test_fit_palette_finds_clusters_and_is_deterministic():
  rng = np.random.default_rng(0)
  centers = rng.integers(30, 225, (6, 3))
  pixels = centers[rng.integers(0, 6, 4000)] + rng.integers(-3, 4, (4000, 3))
  fitted = palette.fit_palette(pixels.astype(np.uint8), 6, seed=1)
  colors = 127.5 * (fitted + 1)
  nearest = np.abs(colors[None] - centers[:, None]).max(-1).min(axis=1)
  assert nearest.max() < 1.5
  again = palette.fit_palette(pixels.astype(np.uint8), 6, seed=1)
  np.testing.assert_array_equal(fitted, again)


def test_fit_palette_with_too_few_colors_raises():
  with pytest.raises(ValueError, match="num_colors: 2"):
    palette.fit_palette(np.zeros((2, 2, 3), np.uint8), 2)


def test_read_palette_accepts_npy_and_processor_config(tmp_path, load_golden):
  clusters = load_golden("imagegpt_a")[1]["clusters"]
  npy = str(tmp_path / "kmeans_centers.npy")
  np.save(npy, clusters)
  np.testing.assert_array_equal(palette.read_palette(npy), clusters)
  processor = tmp_path / "preprocessor_config.json"
  processor.write_text(json.dumps({"clusters": clusters.tolist(), "size": {"height": 8}}))
  np.testing.assert_array_equal(palette.read_palette(str(processor)), clusters)


def write_petabyte_header(path):
  header = {"descr": "<f4", "fortran_order": False, "shape": (10**14, 3)}
  with path.open("wb") as stream:
    np.lib.format.write_array_header_1_0(stream, header)


@pytest.mark.parametrize(
  ("name", "write", "message"),
  [
    ("a.npy", functools.partial(np.save, arr=np.zeros((4, 4))), "a.npy: shape"),
    ("a.npy", functools.partial(np.save, arr=np.full((4, 3), 200.0)), "a.npy: values"),
    ("a.npy", lambda path: path.write_text("colours"), "a.npy: not"),
    ("a.npy", write_petabyte_header, "a.npy: not .* claims"),
    ("a.json", lambda path: path.write_text("{}"), "a.json: .*'clusters'"),
  ],
)
def test_invalid_palette_raises(tmp_path, name, write, message):
  write(tmp_path / name)
  with pytest.raises(ValueError, match=message) as error:
    palette.read_palette(str(tmp_path / name))
  assert "\n" not in str(error.value)


def test_missing_palette_raises(tmp_path):
  with pytest.raises(FileNotFoundError, match="none"):
    palette.read_palette(str(tmp_path / "none.npy"))
