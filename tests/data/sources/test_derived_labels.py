"""VTAB's derived labels: hand-computed, and read from a prepared dataset."""

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources.tfds import RULES
from vit_jax_zoo.data.transforms import pixels
from vit_jax_zoo.transfer import suites as benchmarks


@pytest.mark.parametrize(
  ("rule", "record", "label"),
  [
    ("clevr_count", {"objects": {"size": [0, 1, 0]}}, 0),
    ("clevr_count", {"objects": {"size": [0] * 10}}, 7),
    ("clevr_distance", {"objects": {"pixel_coords": [[1, 1, 12.0], [2, 2, 7.9]]}}, 0),
    ("clevr_distance", {"objects": {"pixel_coords": [[1, 1, 8.0], [0, 0, 9.0]]}}, 0),
    ("clevr_distance", {"objects": {"pixel_coords": [[1, 1, 8.2], [0, 0, 9.0]]}}, 1),
    ("clevr_distance", {"objects": {"pixel_coords": [[1, 1, 12.0]]}}, 5),
    ("kitti_distance", {"objects": {"location": [[0, 0, 7.0]], "type": [0]}}, 0),
    ("kitti_distance", {"objects": {"location": [[0, 0, 7], [0, 0, 19]], "type": [3, 2]}}, 1),
    ("kitti_distance", {"objects": {"location": [[0, 0, 50.0]], "type": [1]}}, 2),
    ("kitti_distance", {"objects": {"location": [[0, 0, 7.0]], "type": [7]}}, 3),
    ("kitti_distance", {"objects": {"location": [], "type": []}}, 3),
    ("dsprites_x_position", {"label_x_position": 31}, 15),
    ("dsprites_orientation", {"label_orientation": 39}, 15),
    ("dsprites_orientation", {"label_orientation": 2}, 0),
    ("dsprites_orientation", {"label_orientation": 3}, 1),
  ],
)
def test_rule_labels(rule, record, label):
  found = RULES[rule].label(record[RULES[rule].key])
  assert found == label < RULES[rule].num_classes


class Scenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Three images of 0 and 1 with two cameras, objects in varying numbers, and a label."""

  name = "rule_scenes"
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(shape=(4, 4, 1), encoding_format="png"),
        "image2": tfds.features.Image(shape=(4, 4, 1), encoding_format="png"),
        "label_x_position": tfds.features.ClassLabel(num_classes=32),
        "objects": tfds.features.Sequence(
          {
            "size": tfds.features.ClassLabel(names=["small", "large"]),
            "pixel_coords": tfds.features.Tensor(shape=(3,), dtype=np.float32),
            "bbox": tfds.features.BBoxFeature(),
          }
        ),
      }
    )
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(3):
      image = np.zeros((4, 4, 1), np.uint8)
      image[i] = 1
      image = cv2.imencode(".png", image)[1].tobytes()
      objects = [
        {
          "size": 0,
          "pixel_coords": np.array([0, 0, 9 + k], np.float32),
          "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
        }
        for k in range(3 + i)
      ]
      yield i, {"image": image, "image2": image, "label_x_position": 10 * i, "objects": objects}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  tfds.disable_progress_bar()
  builder = Scenes(data_dir=tmp_path_factory.mktemp("rules"), file_format="array_record")
  builder.download_and_prepare()
  return builder.data_dir


def test_prepared_dataset_labels(folder):
  source = load_source(f"tfds:{folder}", "train", derived_labels="clevr_count", image_key="image")
  assert [source[i]["label"] for i in range(3)] == [0, 1, 2]
  assert source.info.num_classes == 8
  source = load_source(
    f"tfds:{folder}", "train", derived_labels="clevr_distance", image_key="image"
  )
  assert [source[i]["label"] for i in range(3)] == [2, 2, 2]
  assert pixels(source[1]["image"]).max() == 1
  source = load_source(f"tfds:{folder}", "train[1:]", derived_labels="dsprites_x_position")
  assert [source[i]["label"] for i in range(2)] == [5, 10]
  np.testing.assert_array_equal(np.unique(pixels(source[0]["image"])), [0, 255])
  assert pixels(source[0]["image"]).shape == (4, 4, 3)


def test_missing_features_raise(folder):
  with pytest.raises(ValueError, match="derived_labels 'clevr'"):
    load_source(f"tfds:{folder}", "train", derived_labels="clevr")
  with pytest.raises(ValueError, match="no feature 'label_orientation'"):
    load_source(f"tfds:{folder}", "train", derived_labels="dsprites_orientation")
  with pytest.raises(ValueError, match="label_key='objects'"):
    load_source(f"tfds:{folder}", "train", derived_labels="clevr_count", label_key="objects")


def test_vtab_task_counts():
  groups = [task.group for task in benchmarks.VTAB.values()]
  assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
  rules = [task.options["derived_labels"] for task in benchmarks.VTAB.values()
           if "derived_labels" in task.options]  # fmt: skip
  assert sorted(rules) == sorted(RULES)


@pytest.mark.parametrize(
  "table", [benchmarks.VTAB, benchmarks.FEW_SHOT, benchmarks.PROBED, benchmarks.IMAGENET]
)
def test_tfds_has_all_datasets(table):
  """Checks names, configurations, features that options name, and the splits that TFDS states."""
  known = set(tfds.list_builders(with_community_datasets=False))
  for data in table.values():
    name = data.source.removeprefix("tfds:")
    assert name.partition("/")[0] in known
    builder_class = tfds.builder_cls(name.partition("/")[0])
    if "/" in name:
      assert name.partition("/")[2] in builder_class.builder_configs
