"""Hugging Face's JSON files: preprocessing and class names of classifiers."""

import dataclasses
import functools

import numpy as np
import pytest

from vit_jax_zoo.weights import json_files
from vit_jax_zoo.weights.json_files import label_fields, processor_of, read_class_names
from vit_jax_zoo.weights.key_map import WeightsError

read_preprocess = functools.partial(json_files.read_preprocess, kind="ViT")


@pytest.mark.parametrize(
  ("processor", "expected"),
  [
    ({}, lambda x: x / 127.5 - 1),
    ({"do_normalize": False}, lambda x: x / 255),
    ({"do_rescale": False, "do_normalize": False}, lambda x: x),
    ({"rescale_factor": 1 / 127.5, "do_normalize": False}, lambda x: x / 127.5),
    ({"image_mean": None, "image_std": [0.25] * 3}, lambda x: (x / 255 - 0.5) / 0.25),
  ],
)
def test_classifier_preprocessing_steps(processor, expected):
  image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
  preprocess = read_preprocess({**processor, "do_resize": False}, (16, 16))
  (found,) = preprocess([image])
  np.testing.assert_allclose(found, expected(image.astype(np.float64)), atol=1e-4)
  assert read_preprocess(processor_of(preprocess, "X"), (16, 16)).fit == "none"


def test_crop_shorter_side_exact():
  processor = {"size": {"shortest_edge": 400}, "crop_size": 224, "do_center_crop": True}
  preprocess = read_preprocess(processor, (224, 224))
  assert preprocess.resized_size(400, 600) == (400, 600)  # 224 / (224 / 400) is below 400
  with pytest.raises(WeightsError, match="crop_size"):
    read_preprocess({**processor, "crop_size": 448}, (224, 224))


CROPS = {
  "odd": {"size": {"shortest_edge": 65}, "crop_size": 56},
  "wide": {"size": {"shortest_edge": 64}, "crop_size": {"height": 40, "width": 56}},
  "of_a_rectangle": {"size": {"height": 64, "width": 96}, "crop_size": [40, 75], "resample": 3},
}


@pytest.mark.parametrize("name", CROPS)
def test_center_crop_round_trip(name):
  preprocess = read_preprocess({**CROPS[name], "do_center_crop": True}, (224, 224))
  image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
  (height, width), (rows, columns) = preprocess.image_size, preprocess.resized_size(64, 96)
  top, left = (rows - height) // 2, (columns - width) // 2  # as transformers: rounded down
  whole = preprocess.at_size((rows, columns))
  whole = dataclasses.replace(whole, fit="squash", crop_pct=1.0).resize(image)
  expected = whole[top : top + height, left : left + width]
  np.testing.assert_array_equal(preprocess.resize(image), expected)
  assert read_preprocess(processor_of(preprocess, "ViTImageProcessor"), (224, 224)) == preprocess


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*CROPS, "DeiT", "Beit", "CLIP", "Bit", "nothing"])
def test_preprocess_equals_transformers(name):
  import transformers  # with the extra `parity`

  fields = {**CROPS[name], "do_center_crop": True} if name in CROPS else {}
  fields |= dict.fromkeys(("do_resize", "do_normalize")) if name == "nothing" else {}
  kind = name if name in json_files._DEFAULTS else "ViT"
  theirs = getattr(transformers, f"{kind}ImageProcessorPil")(**fields)
  ours = read_preprocess({"image_processor_type": f"{kind}ImageProcessor", **fields}, (224,) * 2)
  rng = np.random.default_rng(0)
  for size in rng.integers(5, 300, (20, 2)).tolist():
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    found = theirs(image, input_data_format="channels_last", return_tensors="np")
    expected = np.moveaxis(found["pixel_values"], 1, -1)
    np.testing.assert_allclose(ours([image]), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["CLIP", "Bit"])
def test_defaults_follow_processor_kind(kind):
  processor = {"image_processor_type": f"{kind}ImageProcessor"}
  found = read_preprocess(processor, (224, 224))
  assert (found.image_size, found.fit, found.interpolation) == ((224, 224), "crop", "bicubic")
  assert (found.mean[0], found.std[0]) == (0.48145466, 0.26862954)
  processor |= {"size": 64, "crop_size": 48}  # a number: the shorter side
  found = read_preprocess(processor, (224, 224))
  assert found.resized_size(40, 80) == (64, 128)


def test_unknown_processor_class_warns(caplog):
  with caplog.at_level("WARNING"):
    read_preprocess({"image_processor_type": "LevitImageProcessor"}, (224, 224))
  assert "LevitImageProcessor" in caplog.text


def test_unnamed_classes_written_as_ids(caplog):
  with caplog.at_level("WARNING"):
    assert label_fields(("ant",), 3)["id2label"] == {"0": "ant", "1": "1", "2": "2"}
  assert "class_names: 1 names of 3 classes" in caplog.text
  assert label_fields((), 1)["id2label"] == {"0": "LABEL_0"}


@pytest.mark.parametrize(
  ("size", "expected"),
  [([384, 300], (384, 300)), (384, (384, 384)), ({"height": 9, "width": 8}, (9, 8))],
)
def test_size_formats_equal_transformers(size, expected):
  assert read_preprocess({"size": size}, (224, 224)).resized_size(40, 70) == expected


@pytest.mark.parametrize(
  "processor",
  [
    *({"size": size} for size in ("384", 384.0, [384], True, {"width": 384}, {"height": 384})),
    {"size": {"longest_edge": 224}},
    {"size": {"shortest_edge": 224, "longest_edge": 500}},
    {"size": {"shortest_edge": 224}},  # without a crop: several sizes
    {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": False},
    {"crop_size": "224", "do_center_crop": True},
    {"rescale_factor": 0},
    {"image_mean": ["a"]},
    {"image_std": [0.5, 0.5]},
    {"pad_size": 300, "do_pad": True},
  ],
)
def test_invalid_values_raise(processor):
  field = next(iter(processor))
  with pytest.raises(WeightsError, match=rf"preprocessor_config\.json: {field}"):
    read_preprocess(processor, (224, 224))


def test_scalar_mean_and_std():
  found = read_preprocess({"image_mean": 0.25, "image_std": [0.5]}, (224, 224))
  assert (found.mean, found.std) == ((0.25,) * 3, (0.5,) * 3)


def test_class_ids_out_of_range_logged(caplog):
  labels = {"1000000000": "x", "-1": "y", "1": "cat"}
  with caplog.at_level("WARNING"):
    assert read_class_names({"id2label": labels}, 2) == {"class_names": ("0", "cat")}
  assert "2 ids that are none of the 2 classes (-1" in caplog.text
  for wrong in ({"a": "b"}, ["a"]):
    with pytest.raises(WeightsError, match=r"config\.json: id2label"):
      read_class_names({"id2label": wrong}, 2)
