import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.data.images import encode, photo
from vit_jax_zoo.data import images, transforms
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.data.transforms.image import _decode_for, sample_distorted_box


def run(specs, image, seed=0, **others):
  example = {"image": image, **others}
  rng = np.random.default_rng(seed)
  for transform in build_transforms(specs):
    example = transform(example, rng)
  return example


class TestReferencePipelines:
  """Bit-exact against TensorFlow, with which the published accuracies were measured."""

  def test_vision_transformer_eval(self, load_golden):
    config, inputs, outputs = load_golden("vit_preproc_a")
    spec = [dict(name="resize", size=config["size"], dtype="float32")]
    image = run(spec, inputs["image"])["image"]
    assert image.dtype == np.float32
    expected = outputs["vit_jax_eval"]
    np.testing.assert_array_equal((image - np.float32(127.5)) / np.float32(127.5), expected)

  def test_big_vision_eval(self, load_golden):
    config, inputs, outputs = load_golden("vit_preproc_a")
    spec = [
      dict(name="resize_small", size=config["small"]),
      dict(name="central_crop", size=config["crop"]),
    ]
    image = run(spec, inputs["image"])["image"]
    np.testing.assert_array_equal(image, outputs["bv_resize_small_central_crop_uint8"])
    expected = outputs["bv_resize_small_central_crop"]
    np.testing.assert_allclose(image / 127.5 - 1, expected, atol=1e-6)

  def test_few_shot_eval(self, load_golden):
    config, inputs, outputs = load_golden("vit_preproc_a")
    spec = [
      dict(name="resize", size=config["small"]),
      dict(name="central_crop", size=config["crop"]),
    ]
    image = run(spec, inputs["image"])["image"]
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image / 127.5 - 1, outputs["bv_resize_central_crop"], atol=1e-6)

  def test_antialias_equals_tensorflow(self, load_golden):
    config, inputs, outputs = load_golden("vit_preproc_a")
    spec = [dict(name="resize", size=config["size"], method="antialias")]
    image = run(spec, inputs["image"])["image"]
    np.testing.assert_array_equal(image, outputs["bv_resize_antialias_uint8"])

  @pytest.mark.parametrize(
    ("size", "small", "expected"),
    [((272, 425), 40, (40, 63)), ((355, 160), 48, (107, 48)), ((53, 71), 40, (40, 54))],
  )
  def test_resize_small_rounds_half_like_tensorflow(self, size, small, expected):
    blank = np.zeros((*size, 3), np.uint8)
    assert run([dict(name="resize_small", size=small)], blank)["image"].shape[:2] == expected


class TestTfResize:
  @pytest.mark.parametrize("method", images.METHODS)
  @pytest.mark.parametrize("size", [(7, 9), (31, 20), (50, 80), (13, 70)])
  def test_shape_dtype_and_content(self, method, size):
    image = photo(31, 40).astype(np.float32)
    resized = images.tf_resize(image, *size, method)
    assert resized.shape == (*size, 3)
    assert resized.dtype == np.float32
    smooth = np.asarray(Image.fromarray(photo(31, 40)).resize(size[::-1], Image.Resampling.BOX))
    assert np.abs(resized - smooth).mean() < 12

  @pytest.mark.parametrize("method", images.METHODS)
  def test_same_size_identity(self, method):
    image = photo(20, 30)
    np.testing.assert_allclose(images.tf_resize(image, 20, 30, method), image, atol=1e-4)

  def test_antialias_close_to_pillow(self):
    image = photo(90, 120)
    ours = images.tf_resize(image, 20, 30, "antialias")
    pillow = np.asarray(Image.fromarray(image).resize((30, 20), Image.Resampling.BILINEAR))
    assert np.abs(ours - pillow).max() < 1.1

  def test_unknown_method_raises(self):
    with pytest.raises(ValueError, match="did you mean 'bilinear'"):
      build_transforms([dict(name="resize", size=3, method="bilinaer")])


class TestRandomResizedCrop:
  def test_sampled_boxes_within_limits(self):
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(2000):
      top, left, height, width = sample_distorted_box((75, 100), (0.1, 0.9), (0.7, 1.4), rng)
      assert 0 <= top <= 75 - height
      assert 0 <= left <= 100 - width
      areas.append(height * width / 7500)
      ratios.append(width / height)
    assert 0.1 <= min(areas) < 0.13
    assert 0.85 < max(areas) <= 0.9
    assert 0.65 < min(ratios) < 0.75
    assert 1.3 < max(ratios) < 1.5

  def test_sampled_boxes_cover_image(self):
    rng = np.random.default_rng(0)
    cover = np.zeros((60, 60))
    for _ in range(1000):
      top, left, height, width = sample_distorted_box((60, 60), (0.05, 0.2), (0.75, 1.33), rng)
      cover[top : top + height, left : left + width] += 1
    assert (cover > 0).mean() > 0.98

  def test_impossible_box_gives_whole_image(self):
    rng = np.random.default_rng(0)
    assert sample_distorted_box((4, 400), (0.9, 1.0), (0.75, 1.33), rng) == (0, 0, 4, 400)

  @pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 3)])
  def test_tiny_images_resized(self, size):
    spec = [dict(name="random_resized_crop", size=8)]
    for seed in range(20):
      assert run(spec, photo(*size), seed)["image"].shape == (8, 8, 3)

  @pytest.mark.parametrize(
    ("box", "reduce"),
    [
      ((0, 0, 420, 560), 8),
      ((33, 57, 300, 401), 8),
      ((33, 57, 130, 401), 4),
      ((300, 400, 120, 160), 4),
      ((5, 7, 85, 500), 2),
      ((5, 7, 60, 60), 1),
    ],
  )
  def test_reduced_decode_same_crop(self, box, reduce):
    data = encode(photo(420, 560), quality=95)
    image, (top, left, height, width) = _decode_for(data, (420, 560), box, (30, 40))
    assert image.shape[1] == -(-560 // reduce)
    assert top + height <= image.shape[0] <= -(-420 // reduce)
    edges = np.array([top, left, top + height, left + width]) * reduce
    expected = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]])
    assert np.abs(edges - expected).max() <= reduce / 2
    resized = images.resize(image[top : top + height, left : left + width], 30, 40)
    crop = images.decode_image(data)[edges[0] : edges[2], edges[1] : edges[3]]
    expected = Image.fromarray(crop).resize((40, 30), Image.Resampling.BILINEAR)
    assert np.abs(resized.astype(int) - np.asarray(expected)).mean() < 3.5

  @pytest.mark.parametrize("seed", range(6))
  def test_encoded_close_to_decoded(self, seed):
    data = encode(photo(420, 560), quality=95)
    spec = [dict(name="random_resized_crop", size=[60, 80])]
    encoded = run(spec, data, seed)["image"]
    decoded = run(spec, images.decode_image(data), seed)["image"]
    assert encoded.shape == decoded.shape == (60, 80, 3)
    assert np.corrcoef(encoded.ravel(), decoded.ravel())[0, 1] > 0.97

  def test_antialias_false(self):
    noise = np.random.default_rng(0).integers(256, size=(300, 300, 3), dtype=np.uint8)
    spec = dict(name="random_resized_crop", size=16, area=(0.9, 1.0))
    smooth = run([spec], noise)["image"].std()
    rough = run([{**spec, "antialias": False}], noise)["image"].std()
    assert smooth < 10
    assert rough > 25

  @pytest.mark.parametrize("field", [dict(area=(0.5, 0.1)), dict(area=(0, 1)), dict(area=(0.5, 2))])
  def test_invalid_area_raises(self, field):
    with pytest.raises(ValueError, match=r"area is "):
      build_transforms([dict(name="random_resized_crop", size=8, **field)])


class TestSimpleTransforms:
  def test_random_flip(self):
    image = photo(5, 7)
    flipped = [run([dict(name="random_flip")], image, seed)["image"] for seed in range(40)]
    mirrored = [np.array_equal(f, image[:, ::-1]) for f in flipped]
    same = [np.array_equal(f, image) for f in flipped]
    assert sum(mirrored) + sum(same) == 40
    assert 8 < sum(mirrored) < 32

  def test_random_translate_all_shifts(self):
    image = np.zeros((5, 5, 3), np.uint8)
    image[2, 2] = 255
    spec = [dict(name="random_translate", pixels=1)]
    places = {tuple(np.argwhere(run(spec, image, s)["image"][..., 0])[0]) for s in range(100)}
    assert places == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}

  def test_random_translate_fill(self):
    image = np.zeros((4, 4, 3), np.uint8)
    spec = [dict(name="random_translate", pixels=4, fill=9)]
    values = {v for s in range(20) for v in np.unique(run(spec, image, s)["image"])}
    assert values == {0, 9}

  def test_random_crop_all_windows(self):
    image = photo(9, 12)
    spec = [dict(name="random_crop", size=[8, 10])]
    windows = {run(spec, image, s)["image"].tobytes() for s in range(60)}
    expected = {image[y : y + 8, x : x + 10].tobytes() for y in range(2) for x in range(3)}
    assert windows == expected

  def test_central_crop_window(self):
    image = photo(9, 12)
    cropped = run([dict(name="central_crop", size=(4, 6))], image)["image"]
    assert np.array_equal(cropped, image[2:6, 3:9])

  def test_crop_larger_than_image_raises(self):
    with pytest.raises(ValueError, match=r"10x10 .*9x12"):
      run([dict(name="central_crop", size=10)], photo(9, 12))

  def test_resize_small_keeps_aspect_ratio(self):
    image = run([dict(name="resize_small", size=20)], photo(33, 71))["image"]
    assert image.shape == (20, 43, 3)

  def test_one_hot_multi_hot(self):
    one = run([dict(name="one_hot", num_classes=4)], b"", label=2)
    assert one["label"].tolist() == [0, 0, 1, 0]
    many = [dict(name="multi_hot", num_classes=4)]
    assert run(many, b"", label=np.array([0, 3]))["label"].tolist() == [1, 0, 0, 1]
    assert run(many, b"", label=np.zeros(0, np.int32))["label"].tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"label: 4; expected 0 to 3"):
      run(many, b"", label=[1, 4])

  def test_encoded_and_grey_images_decoded(self):
    image = photo(20, 20)[..., 0]
    for given in (image, image[..., None], encode(image, "PNG")):
      decoded = run([dict(name="decode")], given)["image"]
      assert np.array_equal(decoded, np.repeat(image[..., None], 3, axis=2))

  def test_input_image_not_modified(self):
    image = photo(20, 24)
    before = image.copy()
    specs = [
      dict(name="random_translate", pixels=2),
      dict(name="random_flip", probability=1.0),
      dict(name="random_resized_crop", size=8),
    ]
    run(specs, image, label=1)
    assert np.array_equal(image, before)


class TestBuild:
  @pytest.mark.parametrize(
    ("spec", "message"),
    [
      (dict(name="random_flop"), "transform 'random_flop'.*'random_flip'"),
      (dict(name="resize", sise=3), "transform 'resize' 'sise'.*'size'"),
      (dict(name="resize"), "transform 'resize' .*'size'"),
      (dict(size=3), "transform 'None'"),
      (dict(name="resize", size=3, dtype="float23"), "did you mean 'float32'"),
    ],
  )
  def test_invalid_specs_raise(self, spec, message):
    with pytest.raises(ValueError, match=message) as error:
      build_transforms([spec])
    assert "\n" not in str(error.value)

  def test_registered_transforms_documented_and_frozen(self):
    for name, transform in transforms.TRANSFORMS.items():
      assert name == transform.name
      assert transform.__doc__
      assert "`" in transform.__doc__  # names the keys that it reads or writes
      assert transform.__dataclass_params__.frozen
      assert all(f.type for f in dataclasses.fields(transform))

  def test_target_transforms(self):
    """Inference drops these: a user's image has no labels, boxes or label maps."""
    assert {n for n, transform in transforms.TRANSFORMS.items() if transform.is_target} == {
      "one_hot", "multi_hot", "load_objects", "keep_classes", "pad_objects", "load_label_map",
      "pad_label_map",
    }  # fmt: skip
