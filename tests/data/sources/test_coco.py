"""COCO folders (detection, panoptic), Roboflow folders, and COCO prepared by TFDS."""

import json
import os
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from pycocotools import mask as coco_mask

from tests.data.images import encode, photo
from vit_jax_zoo.data.pipeline import eval_batches, train_batches
from vit_jax_zoo.data.sources import coco as coco_names
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms import build_transforms

TRAIN = build_transforms([dict(name="load_objects", masks=True), dict(name="pad_objects", num=4)])
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 7, "name": "train"}]
SQUARE = [[10, 5, 30, 5, 30, 25, 10, 25]]


def annotation(number, image, category, bbox, **more):
  more = {"area": bbox[2] * bbox[3], "iscrowd": 0, "segmentation": SQUARE} | more
  return {"id": number, "image_id": image, "category_id": category, "bbox": bbox} | more


def run_lengths(mask):
  """COCO's uncompressed run lengths: column-major, zeros first."""
  flat = np.asarray(mask, int).ravel(order="F")
  edges = np.flatnonzero(np.diff(flat)) + 1
  counts = np.diff([0, *edges, flat.size]).tolist()
  return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def write_instances(root, split="train2017", images=None):
  (root / "annotations").mkdir(parents=True, exist_ok=True)
  folder = images or root / split
  folder.mkdir(parents=True, exist_ok=True)
  for number in (5, 9, 12):
    (folder / f"{number:03}.jpg").write_bytes(encode(photo(40, 60, seed=number)))
  crowd = np.zeros((40, 60), bool)
  crowd[:, 50:] = True
  data = {
    "images": [
      {"id": n, "file_name": f"{n:03}.jpg", "height": 40, "width": 60} for n in (5, 9, 12)
    ],
    "annotations": [
      annotation(1, 5, 7, [10, 5, 20, 20]),
      annotation(2, 5, 1, [50, 0, 10, 40], iscrowd=1, segmentation=run_lengths(crowd)),
      annotation(3, 9, 3, [-5, 10, 25, 20]),
      annotation(4, 9, 3, [12, 10, 0, 20]),
      annotation(6, 9, 1, [70, 10, 5, 5]),
    ],
    "categories": CATEGORIES,
  }
  return folder, data


@pytest.fixture
def instances(tmp_path):
  for split in ("train2017", "val2017"):
    _, data = write_instances(tmp_path, split)
    (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
  return tmp_path


def first_batch(source, transforms=TRAIN):
  return next(iter(eval_batches(source, transforms, batch_size=len(source))))


class TestInstances:
  def test_class_ids_are_coco_ids_with_unnamed_gaps(self, instances):
    """Class ids stay raw; num_classes is the highest id + 1, as in published weights."""
    source = load_source(f"coco:{instances}", "train")
    assert source.info.num_classes == 8
    assert source.info.class_names[1:4] == ("person", "N/A", "car")
    assert source[0]["labels"].tolist() == [7, 1]
    for name in ("train2017", "val", "validation", "val2017"):
      assert len(load_source(f"coco:{instances}", name)) == 3

  def test_training_targets_drop_crowds_and_empty_boxes(self, instances):
    """The official rule: crowds dropped, boxes clipped, boxes without area dropped."""
    batch = first_batch(load_source(f"coco:{instances}", "train"))
    assert batch["is_target"].sum(axis=1).tolist() == [1, 1, 0]
    assert batch["labels"][:2, 0].tolist() == [7, 3]
    np.testing.assert_allclose(batch["boxes_cxcywh"][0, 0], [20 / 60, 15 / 40, 20 / 60, 20 / 40])
    np.testing.assert_allclose(batch["boxes_cxcywh"][1, 0], [10 / 60, 20 / 40, 20 / 60, 20 / 40])
    assert batch["image_id"].tolist() == [5, 9, 12]
    rows, columns = np.nonzero(batch["masks"][0, 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 24, 10, 29)

  @pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools and numpy 2
  def test_as_annotated_keeps_crowds_and_unclipped_boxes(self, instances):
    transforms = build_transforms(
      [
        dict(name="load_objects", as_annotated=True, masks=True, run_lengths=1000),
        dict(name="pad_objects", num=4),
      ]
    )
    batch = first_batch(load_source(f"coco:{instances}", "val"), transforms)
    assert batch["is_target"].sum(axis=1).tolist() == [2, 3, 0]
    assert batch["is_crowd"][0].tolist() == [False, True, False, False]
    np.testing.assert_allclose(batch["boxes_cxcywh"][1, 0], [7.5 / 60, 20 / 40, 25 / 60, 20 / 40])
    assert batch["masks"][0, 1].sum() == 400  # the crowd's run lengths
    lines = batch["run_lengths"][0].tobytes().rstrip(b"\0").splitlines()
    decoded = [coco_mask.decode({"size": [40, 60], "counts": line}) for line in lines]
    np.testing.assert_array_equal(decoded, batch["masks"][0, :2])

  def test_keep_classes_drops_run_lengths(self, instances):
    specs = [
      dict(name="load_objects", as_annotated=True, run_lengths=1000),
      dict(name="pad_objects", num=4),
    ]
    source = load_source(f"coco:{instances}", "val")
    whole = first_batch(source, build_transforms(specs))["run_lengths"][0].tobytes()
    specs.insert(1, dict(name="keep_classes", below=2))
    batch = first_batch(source, build_transforms(specs))
    kept = batch["run_lengths"][0].tobytes()
    assert batch["labels"][0, 0] == 1
    assert len(kept) == len(whole)
    assert kept.rstrip(b"\0").splitlines() == whole.rstrip(b"\0").splitlines()[1:]

  def test_dropped_objects_counts_logged(self, instances, caplog):
    caplog.set_level("INFO", logger="absl")
    load_source(f"coco:{instances}", "train")
    assert "2 x bbox without area" in caplog.text
    assert "annotation 4 of 009.jpg, annotation 6 of 009.jpg" in caplog.text
    assert "1 crowds" in caplog.text

  def test_annotated_only_drops_unannotated_images(self, instances):
    assert len(load_source(f"coco:{instances}", "train", annotated_only=True)) == 2

  def test_pickled_source_batches(self, instances):
    """Worker processes need sources that can be pickled."""
    source = pickle.loads(pickle.dumps(load_source(f"coco:{instances}", "train")))
    with train_batches(source, TRAIN, batch_size=3, seed=0, buckets=((64, 64),)) as batches:
      assert next(batches)["image"].shape == (3, 64, 64, 3)

  def test_images_subfolder_found(self, tmp_path):
    _, data = write_instances(tmp_path, images=tmp_path / "images" / "train2017")
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(data))
    assert first_batch(load_source(f"coco:{tmp_path}", "train"))["image"].shape[0] == 3

  def test_roboflow_layout_found(self, tmp_path):
    """Each split has its annotations beside its images."""
    for split in ("train", "valid"):
      folder, data = write_instances(tmp_path, images=tmp_path / split)
      (folder / "_annotations.coco.json").write_text(json.dumps(data))
    for split in ("train", "valid", "val"):
      assert len(load_source(f"coco:{tmp_path}", split)) == 3


class TestPanoptic:
  @pytest.fixture
  def panoptic(self, tmp_path):
    _, data = write_instances(tmp_path)
    segments = tmp_path / "annotations" / "panoptic_train2017"
    segments.mkdir()
    ids = np.zeros((40, 60), np.int64)
    ids[:, 20:] = 300
    ids[20:, :] = 70000
    ids[:, 55:] = 0
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(colors).save(segments / "005.png")
    segment = [
      {"id": 70000, "category_id": 93, "iscrowd": 0, "bbox": [0, 20, 55, 20], "area": 1100},
      {"id": 300, "category_id": 7, "iscrowd": 0, "bbox": [20, 0, 35, 20], "area": 700},
    ]
    data["images"] = data["images"][:1]
    data["annotations"] = [{"image_id": 5, "file_name": "005.png", "segments_info": segment}]
    data["categories"] = [{"id": 7, "name": "train"}, {"id": 93, "name": "blanket"}]
    (tmp_path / "annotations" / "panoptic_train2017.json").write_text(json.dumps(data))
    return tmp_path, ids

  def test_segment_map_multi_channel_ids(self, panoptic):
    """Ids span more than one colour channel; some pixels belong to no segment."""
    root, ids = panoptic
    source = load_source(f"coco:{root}", "train", panoptic=True)
    assert source.info.num_classes == 94
    specs = [
      dict(name="load_objects", as_annotated=True, masks=True, segment_map=True),
      dict(name="pad_objects", num=4),
    ]
    batch = first_batch(source, build_transforms(specs))
    expected = np.select([ids == 70000, ids == 300], [0, 1], -1)
    np.testing.assert_array_equal(batch["segment_map"][0], expected)
    np.testing.assert_array_equal(batch["masks"][0, 1], ids == 300)
    assert batch["labels"][0, :2].tolist() == [93, 7]

  def test_panoptic_label_map(self, panoptic):
    root, ids = panoptic
    specs = [dict(name="load_label_map"), dict(name="pad_label_map", height=40, width=64)]
    batch = first_batch(
      load_source(f"coco:{root}", "train", panoptic=True), build_transforms(specs)
    )
    expected = np.select([ids == 70000, ids == 300], [93, 7], 255)
    np.testing.assert_array_equal(batch["label_map"][0, :, :60], expected)
    assert (batch["label_map"][0, :, 60:] == 255).all()

  def test_segment_folder_missing_raises(self, panoptic):
    root, _ = panoptic
    (root / "annotations" / "panoptic_train2017").rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"panoptic_train2017 is missing"):
      load_source(f"coco:{root}", "train", panoptic=True)


class TestErrors:
  def broken(self, root, change):
    _, data = write_instances(root)
    change(data)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(data))
    return f"coco:{root}"

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      (lambda d: d.pop("images"), "images is missing"),
      (
        lambda d: d["annotations"][2].update(category_id=2),
        r"category_id.*annotation 3 of 009.jpg: 2",
      ),
      (lambda d: d["annotations"][0].update(image_id=77), r"annotation 1: image 77"),
      (lambda d: d["images"].clear() or d["annotations"].clear(), "images is empty"),
      (lambda d: d.update(categories=[], annotations=[]), "categories is empty"),
    ],
  )
  def test_invalid_annotations_raise(self, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
      load_source(self.broken(tmp_path, change), "train")
    assert "\n" not in str(error.value)

  def test_missing_folder_raises(self, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"coco:.* is no folder"):
      load_source(f"coco:{tmp_path}/nowhere", "train")
    with pytest.raises(ValueError, match=r"annotations/instances_\*\.json"):
      load_source(f"coco:{tmp_path}", "train")

  def test_missing_image_raises_or_skipped(self, tmp_path):
    """All file names are checked before the first batch."""
    source = load_source(self.broken(tmp_path, lambda d: None), "train")
    (tmp_path / "train2017" / "009.jpg").unlink()
    assert source.missing() == [1]
    assert load_source(f"coco:{tmp_path}", "train[1:]+train[:2]").missing() == [0, 3]
    with pytest.raises(FileNotFoundError, match=r"1 files .*009\.jpg"):
      eval_batches(source, TRAIN, batch_size=3)
    batches = eval_batches(source, TRAIN, batch_size=3, on_corrupt="skip")
    assert next(iter(batches))["mask"].tolist() == [True, False, True]

  def test_irregular_files_missing(self, tmp_path):
    """Opening a FIFO would block."""
    name = self.broken(tmp_path, lambda d: None)
    for number in (5, 9):
      (tmp_path / "train2017" / f"{number:03}.jpg").unlink()
    os.mkfifo(tmp_path / "train2017" / "005.jpg")
    (tmp_path / "train2017" / "009.jpg").mkdir()
    source = load_source(name, "train")
    assert source.missing() == [0, 1]
    for index in (0, 1):
      with pytest.raises(ValueError, match=r"00[59]\.jpg .*(regular file|a folder)"):
        source[index]

  def test_image_size_mismatch_raises(self, tmp_path):
    name = self.broken(tmp_path, lambda d: d["images"][0].update(height=60, width=40))
    with pytest.raises(ValueError, match=r"005\.jpg.*for 60x40.*exif_frame") as error:
      first_batch(load_source(name, "train"))
    assert "\n" not in str(error.value)

  def test_pad_objects_num_exceeded_raises(self, instances):
    specs = [dict(name="load_objects", as_annotated=True), dict(name="pad_objects", num=2)]
    with pytest.raises(ValueError, match=r"009\.jpg: .*pad_objects' num=2"):
      first_batch(load_source(f"coco:{instances}", "train"), build_transforms(specs))


class Coco(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Two images with the features of TFDS's `coco/2017`."""

  VERSION = tfds.core.Version("1.1.0")

  def _info(self):
    objects = {
      "area": np.int64,
      "bbox": tfds.features.BBoxFeature(),
      "id": np.int64,
      "is_crowd": np.bool_,
      "label": tfds.features.ClassLabel(names=list(coco_names.THINGS.values())),
    }
    features = {
      "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
      "image/filename": tfds.features.Text(),
      "image/id": np.int64,
      "objects": tfds.features.Sequence(objects),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    box = tfds.features.BBox(ymin=0.25, xmin=0.1, ymax=0.75, xmax=0.5)
    one = {"area": 300, "bbox": box, "id": 8, "is_crowd": False, "label": "toothbrush"}
    for number, objects in ((139, [one]), (285, [])):
      image = encode(photo(40, 60, seed=number))
      yield (
        number,
        {"image": image, "image/filename": "x", "image/id": number, "objects": objects},
      )


def test_tfds_coco_labels_mapped_to_coco_ids(tmp_path):
  """TFDS numbers the classes from 0 to 79; COCO's id of toothbrush is 90."""
  tfds.disable_progress_bar()
  Coco(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  source = load_source("tfds:coco", "train", data_dir=str(tmp_path))
  assert source.info.num_classes == 91
  assert source.info.class_names[90] == "toothbrush"
  examples = {example["image_id"]: example for example in (source[0], source[1])}
  assert examples[139]["labels"].tolist() == [90]
  np.testing.assert_allclose(examples[139]["boxes_xyxy"], [[6, 10, 30, 30]], rtol=1e-5)
  assert examples[285]["boxes_xyxy"].shape == (0, 4)
  assert source.image_size(0) == (40, 60)
  with pytest.raises(ValueError, match="has no panoptic segments"):
    load_source("tfds:coco", "train", data_dir=str(tmp_path), panoptic=True)


def test_class_table_counts():
  assert (len(coco_names.THINGS), max(coco_names.THINGS)) == (80, 90)
  assert (len(coco_names.STUFF), max(coco_names.STUFF)) == (53, 200)
  gaps = set(range(1, 91)) - set(coco_names.THINGS)
  assert gaps == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
  assert coco_names.coco_ids(("cat", "dog")) is None


def test_panoptic_files_named(tmp_path):
  (tmp_path / "annotations").mkdir()
  (tmp_path / "annotations" / "panoptic_train.json").write_text("{}")
  with pytest.raises(ValueError, match=r"panoptic_train\.json needs panoptic=True"):
    load_source(f"coco:{tmp_path}", "train")
