"""Predictions with the ids of a COCO file, scored by pycocotools."""

import json
import unicodedata

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vit_jax_zoo import predict
from vit_jax_zoo.inference import base
from vit_jax_zoo.inference.coco_json import GroundTruth, box_annotation

CLASSES = {7: "cat", 3: "dog"}
BOXES = {1: [(7, [5, 4, 20, 10]), (3, [30, 8, 12, 25])], 2: [(3, [2, 2, 40, 30])], 3: []}
"""Category id and (left, top, width, height) of the objects, by the image's gray value."""


class Oracle(base.Predictor):
  """Predicts the ground truth of an image; class ids are the model's own."""

  reads = frozenset()

  def __init__(self, names=None):
    self.names = names or CLASSES

  def prepare(self, image):
    return {"image": image}

  def predict(self, images, batch):
    return [self.find(image) for image in images]

  def find(self, image):
    found = []
    for category, (left, top, width, height) in BOXES[int(image[0, 0, 0])]:
      label = next(i for i, name in self.names.items() if name == CLASSES[category])
      box = [float(side) for side in (left, top, left + width, top + height)]
      found.append(box_annotation({"category_id": label, "name": CLASSES[category]}, box, 0.9))
    return base.Result({"detections": found}, lambda: {"": image}, objects=found)


def dataset(folder, ids, names=("a.png", "val/b.png", "c.png")):
  """Writes three images to val/ and their annotation file; returns the paths and the file."""
  (folder / "val").mkdir()
  paths = [folder / "val" / name for name in ("a.png", "b.png", "c.png")]
  annotations = []
  for gray, (path, number) in enumerate(zip(paths, ids, strict=True), start=1):
    Image.fromarray(np.full((40, 60, 3), gray, np.uint8)).save(path)
    for category, box in BOXES[gray]:
      annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
      annotations.append({**annotation, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
  images = [
    {"id": number, "file_name": name, "height": 40, "width": 60}
    for number, name in zip(ids, names, strict=True)
  ]
  categories = [{"id": i, "name": name, "supercategory": "x"} for i, name in CLASSES.items()]
  file = folder / "instances_val.json"
  file.write_text(
    json.dumps({"images": images, "annotations": annotations, "categories": categories})
  )
  return paths, file


def read(folder, name):
  return json.loads((folder / "out" / name).read_text())


def average_precision(file, results):
  truth = COCO(str(file))
  run = COCOeval(truth, truth.loadRes(str(results)), "bbox")
  run.evaluate()
  run.accumulate()
  run.summarize()
  return run.stats[0]


@pytest.mark.parametrize("ids", [(9, 4, 5), (2**40, 2**41, 3), (2**70, 2**71, 2**72), tuple("xyz")])
@pytest.mark.parametrize("names", [None, {0: "cat", 7: "dog"}])
def test_ground_truth_predictions_have_ap_one(tmp_path, ids, names):
  """Classes are matched by name: the second model's id 7 is the file's 3."""
  paths, file = dataset(tmp_path, ids)
  truth = GroundTruth(file, paths)
  assert predict.predict_all(Oracle(names), paths, tmp_path / "out", truth) == 0
  assert average_precision(file, tmp_path / "out" / "coco_results.json") == 1
  coco = read(tmp_path, "coco.json")
  assert [image["id"] for image in coco["images"]] == list(ids)
  assert coco["categories"] == json.loads(file.read_text())["categories"]
  assert [a["category_id"] for a in coco["annotations"]] == [7, 3, 3]
  assert [r["image_id"] for r in read(tmp_path, "predictions.json")] == list(ids)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_composed_or_not(tmp_path, forms):
  in_file, of_user = (unicodedata.normalize(form, "\u00e9") for form in forms)
  file = tmp_path / "gt.json"
  images = [{"id": 9, "file_name": f"{in_file}/{in_file}.png", "height": 4, "width": 4}]
  categories = [{"id": 5, "name": in_file}]
  file.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
  truth = GroundTruth(file, [tmp_path / of_user / f"{of_user}.png"])
  assert list(truth.image_ids.values()) == [9]
  assert truth.category_id(1, of_user) == 5
  assert truth.categories == categories


def test_unmatched_images_logged_and_skipped(tmp_path, caplog):
  paths, file = dataset(tmp_path, (1, 2, 3), ("x/a.png", "y/a.png", "other.png"))
  truth = GroundTruth(file, paths)
  assert predict.predict_all(Oracle(), paths, tmp_path / "out", truth) == 0
  assert read(tmp_path, "coco.json")["images"] == read(tmp_path, "coco_results.json") == []
  assert f"{paths[0]}: 2 images of {file}" in caplog.text
  assert f"{paths[1]}: not in {file}" in caplog.text
  assert f"{file}: 3 of 3 images are not given" in caplog.text
  assert [r["image_id"] for r in read(tmp_path, "predictions.json")] == [None] * 3


def test_duplicate_file_name_counted_once(tmp_path, caplog):
  paths, file = dataset(tmp_path, (1, 2, 3))
  found = GroundTruth(file, [*paths, tmp_path / "more" / "a.png"]).image_ids
  assert list(found) == [str(path) for path in paths]
  assert "more/a.png: image 1" in caplog.text


def test_unknown_classes_get_unused_ids(tmp_path, caplog):
  paths, file = dataset(tmp_path, (1, 2, 3))
  truth = GroundTruth(file, paths)
  classes = ((7, "cow"), (5, "pig"), (3, None), (6, None))
  assert [truth.category_id(*one) for one in classes] == [8, 5, 3, 6]
  assert [c["name"] for c in truth.categories] == ["cat", "dog", "cow", "pig", "6"]
  assert "'cow'" in caplog.text


def test_class_names_lone_surrogates_escaped(tmp_path):
  """JSON can contain lone surrogates; the model's class names are escaped."""
  paths, file = dataset(tmp_path, (1, 2, 3))
  text = file.read_text().replace('"dog"', r'"dog\ud83d"')
  file.write_text(text)
  truth = GroundTruth(file, paths)
  assert [truth.category_id(0, "cat"), truth.category_id(1, r"dog\ud83d")] == [7, 3]
  assert truth.categories == json.loads(text)["categories"]


def test_image_size_mismatch_logged(tmp_path, caplog):
  paths, file = dataset(tmp_path, (1, 2, 3))
  Image.fromarray(np.full((60, 40, 3), 3, np.uint8)).save(paths[2])
  predict.predict_all(Oracle(), paths, tmp_path / "out", GroundTruth(file, paths))
  assert f"{paths[2]}: 60x40" in caplog.text


def test_file_without_annotations(tmp_path):
  paths, file = dataset(tmp_path, (1, 2, 3))
  data = json.loads(file.read_text())
  del data["annotations"]
  file.write_text(json.dumps(data))
  assert list(GroundTruth(file, paths).image_ids.values()) == [1, 2, 3]
  del data["images"]
  file.write_text(json.dumps(data))
  with pytest.raises(ValueError, match="images is missing"):
    GroundTruth(file, paths)


def test_ground_truth_not_overwritten(tmp_path):
  paths, file = dataset(tmp_path, (1, 2, 3))
  (tmp_path / "out").mkdir()
  truth = file.rename(tmp_path / "out" / "coco.json")
  before = truth.read_bytes()
  (tmp_path / "out" / predict.MARK).write_text("coco.json\0")
  with pytest.raises(ValueError, match=r"--coco_ids=.*coco\.json"):
    predict.predict_all(Oracle(), paths, tmp_path / "out", GroundTruth(truth, paths))
  assert truth.read_bytes() == before
