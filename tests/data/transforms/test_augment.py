"""RandAugment, TensorFlow and timm variants: sampling of operations and meaning of magnitudes."""

import collections

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vit_jax_zoo.data.sources.demo import read_photo
from vit_jax_zoo.data.transforms import augment as ops
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.data.transforms.augment import COMMON, RandAugment, TimmRandAugment


@pytest.fixture(scope="module")
def photo():
  return np.ascontiguousarray(read_photo("temple")[100:196, 200:296])


def one(policy, image, operation, seed=0):
  layer = policy.apply_layer(Image.fromarray(image), operation, np.random.default_rng(seed))
  return np.asarray(layer)


def outcomes(policy, image, operation, seeds=range(12)):
  """Returns the distinct results of an operation, as bytes."""
  return {one(policy, image, operation, seed).tobytes() for seed in seeds}


def either_way(function, amount):
  return {np.asarray(function(sign * amount)).tobytes() for sign in (-1, 1)}


@pytest.mark.parametrize("name", ["rand_augment", "timm_rand_augment"])
def test_deterministic_given_rng(photo, name):
  (transform,) = build_transforms([{"name": name}])
  before = photo.copy()
  results = [transform({"image": photo}, np.random.default_rng(s))["image"] for s in (3, 3, 4, 5)]
  np.testing.assert_array_equal(results[0], results[1])
  assert any((results[0] != other).any() for other in results[2:])
  np.testing.assert_array_equal(photo, before)
  assert all(r.dtype == np.uint8 and r.shape == photo.shape for r in results)


@pytest.mark.parametrize(("policy", "count"), [(RandAugment(), 16), (TimmRandAugment(), 15)])
def test_operations_drawn_uniformly_with_replacement(policy, count, photo, monkeypatch):
  drawn = []

  def record(self, image, operation, rng):
    drawn.append(operation)
    return image

  monkeypatch.setattr(type(policy), "apply_layer", record)
  rng = np.random.default_rng(0)
  for _ in range(4000):
    policy.apply(photo, rng)
  assert len(drawn) == 8000
  fractions = np.array([*collections.Counter(drawn).values()]) / 8000
  assert len(fractions) == count
  np.testing.assert_allclose(fractions, 1 / count, atol=0.013)  # five standard deviations
  pairs = np.reshape(drawn, (-1, 2))
  assert np.mean(pairs[:, 0] == pairs[:, 1]) == pytest.approx(1 / count, abs=0.02)


class TestTensorFlowVariant:
  def test_enhance_factor_from_magnitude(self, photo):
    for magnitude, factor in ((0, 0.1), (10, 1.9), (20, 3.7)):
      policy = RandAugment(magnitude=magnitude)
      bright = ImageEnhance.Brightness(Image.fromarray(photo)).enhance(factor)
      np.testing.assert_array_equal(one(policy, photo, "brightness"), bright)

  def test_contrast_blends_with_pixel_count(self, photo):
    expected = np.clip(36 + np.float32(1.9) * (photo.astype(np.float32) - 36), 0, 255)
    result = one(RandAugment(magnitude=10), photo, "contrast")  # 96 * 96 / 256 = 36
    np.testing.assert_array_equal(result, expected.astype(np.uint8))

  @pytest.mark.parametrize(
    ("magnitude", "bits"), [(0, 1), (5, 2), (10, 4), (15, 6), (20, 8), (25, 1)]
  )
  def test_posterize_bits_from_magnitude(self, photo, magnitude, bits):
    result = one(RandAugment(magnitude=magnitude), photo, "posterize")
    np.testing.assert_array_equal(result, ImageOps.posterize(Image.fromarray(photo), bits))

  @pytest.mark.parametrize(
    ("magnitude", "threshold"), [(0, 0), (5, 128), (9, 230), (10, 0), (15, 128), (20, 0)]
  )
  def test_solarize_threshold_overflows(self, photo, magnitude, threshold):
    result = one(RandAugment(magnitude=magnitude), photo, "solarize")
    np.testing.assert_array_equal(result, ImageOps.solarize(Image.fromarray(photo), threshold))

  def test_translate_fills_grey(self, photo):
    policy = RandAugment(magnitude=3)  # 30 pixels
    shifted = one(policy, photo, "translate_x")
    grey = (shifted == 128).all(axis=(0, 2))
    assert grey[:30].all() or grey[-30:].all()
    inner = shifted[:, 30:] if grey[:30].all() else shifted[:, :-30]
    np.testing.assert_array_equal(inner, photo[:, :-30] if grey[:30].all() else photo[:, 30:])
    assert len(outcomes(policy, photo, "translate_x")) == 2

  @pytest.mark.parametrize("operation", ["shear_x", "shear_y"])
  def test_shear_by_pixel_index(self, photo, operation):
    y, x = np.mgrid[:96, :96]
    expected = set()
    for shear in (-0.219, 0.219):
      along, across = (x, y) if operation == "shear_x" else (y, x)
      source = np.floor(along + shear * across + 0.5).astype(int)
      inside = (source >= 0) & (source < 96)
      at = (y, source.clip(0, 95)) if operation == "shear_x" else (source.clip(0, 95), x)
      expected.add(np.where(inside[..., None], photo[at], 128).astype(np.uint8).tobytes())
    got = outcomes(RandAugment(magnitude=7.3), photo, operation)
    close = [
      min(np.mean(np.frombuffer(g, np.uint8) != np.frombuffer(e, np.uint8)) for e in expected)
      for g in got
    ]
    assert len(got) == 2
    assert max(close) < 0.01  # float rounding at half a pixel

  @pytest.mark.parametrize(("magnitude", "addition"), [(0, 0), (3, 33), (20, 220)])
  def test_solarize_add_formula(self, photo, magnitude, addition):
    expected = np.where(photo < 128, np.minimum(photo.astype(int) + addition, 255), photo)
    result = one(RandAugment(magnitude=magnitude), photo, "solarize_add")
    np.testing.assert_array_equal(result, expected)

  def test_cutout_clipped_at_border(self):
    noise = np.random.default_rng(0).integers(0, 128, (33, 20, 3), dtype=np.uint8)
    cut = one(RandAugment(magnitude=2), noise, "cutout")  # 16 x 16
    rng = np.random.default_rng(0)
    y, x = rng.integers(33), rng.integers(20)
    inside = np.zeros(noise.shape[:2], bool)
    inside[max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = True
    assert inside.sum() < 256
    np.testing.assert_array_equal(cut[~inside], noise[~inside])
    assert (cut[inside] == 128).all()

  def test_cutout_side_from_magnitude(self, photo):
    policy = RandAugment(magnitude=5)
    largest = 0
    for seed in range(20):
      cut = np.argwhere((one(policy, photo, "cutout", seed) == 128).all(axis=2))
      largest = max(largest, len(cut))
    assert 1300 < largest <= 1600 + 60  # 40 x 40, plus grey pixels of the photo


class TestTimmVariant:
  def test_probability_per_operation(self, photo):
    policy = TimmRandAugment()
    kept = [(one(policy, photo, "invert", seed) == photo).all() for seed in range(400)]
    assert np.mean(kept) == pytest.approx(0.5, abs=0.1)

  def test_increasing_enhance_both_directions(self, photo):
    policy = TimmRandAugment(magnitude=5, magnitude_std=0, probability=1.0)
    image = Image.fromarray(photo)
    expected = {np.asarray(ImageEnhance.Color(image).enhance(f)).tobytes() for f in (0.55, 1.45)}
    assert outcomes(policy, photo, "color") == expected

  def test_posterize_and_solarize_levels(self, photo):
    policy = TimmRandAugment(magnitude=7, magnitude_std=0, probability=1.0)
    image = Image.fromarray(photo)
    np.testing.assert_array_equal(one(policy, photo, "posterize"), ImageOps.posterize(image, 2))
    np.testing.assert_array_equal(one(policy, photo, "solarize"), ImageOps.solarize(image, 77))

  def test_geometric_operations_like_pillow(self, photo):
    policy = TimmRandAugment(
      magnitude=10, magnitude_std=0, probability=1.0, interpolation="bicubic", fill=(1, 2, 3)
    )
    wide = np.ascontiguousarray(photo[:48])

    def expected(kind):
      image, fill = Image.fromarray(wide), (1, 2, 3)
      if kind == "rotate":
        return either_way(lambda d: image.rotate(d, ops.Resampling.BICUBIC, fillcolor=fill), 30)
      matrix = {
        "shear_x": lambda s: (1, 0.3 * s, 0, 0, 1, 0),
        "shear_y": lambda s: (1, 0, 0, 0.3 * s, 1, 0),
        "translate_x": lambda s: (1, 0, 0.45 * 96 * s, 0, 1, 0),
        "translate_y": lambda s: (1, 0, 0, 0, 1, 0.45 * 48 * s),
      }[kind]
      affine = Image.Transform.AFFINE
      return either_way(
        lambda s: image.transform(
          image.size, affine, matrix(s), ops.Resampling.BICUBIC, fillcolor=fill
        ),
        1,
      )

    for kind in ("shear_x", "shear_y", "translate_x", "translate_y"):
      assert outcomes(policy, wide, kind) == expected(kind), kind
    turned = np.frombuffer(next(iter(outcomes(policy, wide, "rotate", [0]))), np.uint8)
    references = [np.frombuffer(e, np.uint8) for e in expected("rotate")]
    assert min(np.mean(turned != r) for r in references) < 2e-3

  def test_interpolation_random_by_default(self, photo):
    fields = dict(magnitude=9, magnitude_std=0, probability=1.0)
    both = outcomes(TimmRandAugment(**fields), photo, "rotate", range(40))
    kinds = [
      outcomes(TimmRandAugment(**fields, interpolation=kind), photo, "rotate", range(40))
      for kind in ("bilinear", "bicubic")
    ]
    assert both == kinds[0] | kinds[1]
    assert len(both) == 4

  def test_magnitude_std_clipped_at_ten(self, photo):
    black = np.zeros_like(photo)
    fields = dict(probability=1.0, magnitude=9, magnitude_std=0.5)
    values = [
      int(one(TimmRandAugment(**fields), black, "solarize_add", seed).max()) for seed in range(300)
    ]
    assert max(values) == 110
    assert np.mean(values) == pytest.approx(99, abs=1.5)
    assert np.std(values) == pytest.approx(5.5, abs=1)


@pytest.mark.parametrize(
  "resample", [ops.Resampling.NEAREST, ops.Resampling.BILINEAR, ops.Resampling.BICUBIC]
)
@pytest.mark.parametrize("degrees", [-30.0, 12.5, 27.0])
def test_rotate_close_to_pillow(photo, degrees, resample):
  image, fill = Image.fromarray(photo[:64, :80]), (10, 128, 250)
  expected = image.rotate(degrees, resample, fillcolor=fill)
  turned = ops.move(image, "rotate", degrees / 30, 0.0, fill, resample)
  # Pillow rounds its matrix to 15 digits.
  assert np.mean(np.asarray(turned) != np.asarray(expected)) < 2e-3


def test_all_operations_keep_shape_and_dtype(photo):
  for policy in (RandAugment(), TimmRandAugment(probability=1.0)):
    for operation in policy.operations:
      result = one(policy, photo, operation)
      assert (result.shape, result.dtype) == (photo.shape, np.uint8)
  assert set(RandAugment.operations) - set(COMMON) == {"cutout"}


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    (
      {"name": "rand_augment", "num_layers": 0},
      "rand_augment: num_layers is 0",
    ),
    ({"name": "rand_augment", "magnitude": -1}, r"magnitude is -1"),
    ({"name": "timm_rand_augment", "interpolation": "cubic"}, "did you mean 'bicubic'"),
    ({"name": "timm_rand_augment", "probability": 2.0}, r"probability is 2.0"),
  ],
)
def test_invalid_fields_raise(spec, message):
  with pytest.raises(ValueError, match=message):
    build_transforms([spec])


def test_float_image_raises(photo):
  with pytest.raises(ValueError, match=r"uint8 .*float32"):
    RandAugment().apply(photo.astype(np.float32), np.random.default_rng(0))
