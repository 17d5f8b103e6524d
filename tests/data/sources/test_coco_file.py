"""Validation of COCO annotation files, and annotations of EXIF-rotated images."""

import json
import re
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from faster_coco_eval.core import mask as run_lengths
from PIL import Image

from tests.data.images import encode, photo
from vit_jax_zoo.builder import _open_evaluations
from vit_jax_zoo.data.images import orient
from vit_jax_zoo.data.pipeline import eval_batches, train_batches
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.sources.base import DatasetInfo
from vit_jax_zoo.data.sources.coco_file import _run_lengths_problem
from vit_jax_zoo.data.transforms import build_transforms, detection
from vit_jax_zoo.data.transforms.detection import decode_segments, objects_example

SQUARE = [[10, 5, 30, 5, 30, 25, 10, 25]]
MASKS = build_transforms([dict(name="load_objects", masks=True), dict(name="pad_objects")])
BOXES = build_transforms([dict(name="load_objects"), dict(name="pad_objects")])


def objects(**fields):
  return {
    "id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 5, 20, 20], "area": 400, "iscrowd": 0,
    "segmentation": SQUARE, **fields,
  }  # fmt: skip


def dataset():
  images = [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in (1, 2)]
  found = [objects(), objects(id=2, image_id=2)]
  return {"images": images, "annotations": found, "categories": [{"id": 1, "name": "cat"}]}


def write(root, data, orientation=1):
  (root / "annotations").mkdir(exist_ok=True)
  (root / "train").mkdir(exist_ok=True)
  exif = Image.Exif()
  exif[0x0112] = orientation
  for i in (1, 2):
    (root / "train" / f"{i}.jpg").write_bytes(encode(photo(40, 60, seed=i), exif=exif))
  text = data if isinstance(data, bytes) else json.dumps(data).encode()
  (root / "annotations" / "instances_train.json").write_bytes(text)
  return f"coco:{root}"


def batch_of(source, transforms=MASKS):
  return next(iter(eval_batches(source, transforms, batch_size=len(source))))


def first(**fields):
  return lambda d: d["annotations"][0].update(fields)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda d: d["images"][1].update(id=1), r"image id twice \(1: 1.jpg, 2.jpg\)"),
    (lambda d: d["images"][1].update(id=None), "image without an id"),
    (lambda d: d["images"][1].pop("file_name"), r"image without file_name \(image 2"),
    (lambda d: d["images"][1].pop("height"), "height and width.*image 2, 2.jpg"),
    (lambda d: d["images"][1].update(width=0.5), "height and width.*image 2, 2.jpg"),
    (lambda d: d["images"][1].update(width=True), "height and width.*image 2, 2.jpg"),
    (lambda d: d["images"][1].update(width=1 << 31), "height and width.*image 2, 2.jpg"),
    (lambda d: d["images"][1].update(file_name="a\0.jpg"), r"file_name.*image 2: 'a\\x00.jpg'"),
    (lambda d: d["images"][1].update(file_name="\ud800.jpg"), "file_name.*image 2"),
    (first(bbox=[]), r"bbox.*4 numbers.*annotation 1 of 1.jpg: \[\]"),
    (first(bbox=[1, 2, 3, 4, 5]), "bbox.*4 numbers.*annotation 1 of 1.jpg"),
    (first(bbox=["1", "2", "3", "4"]), "bbox.*4 numbers.*annotation 1 of 1.jpg"),
    (first(bbox=None), "bbox.*4 numbers.*annotation 1 of 1.jpg: None"),
    (first(iscrowd="yes"), "iscrowd.*annotation 1 of 1.jpg: 'yes'"),
    (first(image_id="1"), "annotation 1: image '1'"),
    (first(image_id=True), "annotation 1: image True"),
    (first(id=2), r"1 x annotation id twice.*annotation 2 of 2\.jpg"),
    (first(category_id="1"), "category_id.*annotation 1 of 1.jpg: '1'"),
    (lambda d: d["categories"].append({"id": 1, "name": "dog"}), "two names.*cat, dog"),
    (lambda d: d["categories"].append({"id": 10**9, "name": "x"}), "category id.*1000000000"),
    (lambda d: d["categories"].append({"id": "2", "name": "x"}), "category without an integer id"),
    (lambda d: d.update(annotations={}), "annotations is missing"),
    (lambda d: d["annotations"].append(3), "annotations has 3, not an object"),
  ],
)
def test_invalid_file_raises(tmp_path, change, named):
  data = dataset()
  change(data)
  with pytest.raises(ValueError, match=rf"instances_train\.json.*{named}") as error:
    load_source(write(tmp_path, data), "train")
  assert "\n" not in str(error.value)


def test_error_lists_problems_with_counts(tmp_path):
  data = dataset()
  data["annotations"] = [objects(id=i, bbox=[]) for i in range(50)] + [objects(category_id=7)]
  with pytest.raises(ValueError, match=r"50 x bbox .*; 1 x category_id"):
    load_source(write(tmp_path, data), "train")


@pytest.mark.parametrize(
  ("text", "named"),
  [
    (b"\xe9", "byte 0 is not UTF-8"),
    (b"{", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "images is missing"),
    (b'{"images": [' + b"1" * 5000 + b"]}", "not JSON.*digits"),
  ],
)
def test_invalid_json_raises(tmp_path, text, named):
  with pytest.raises(ValueError, match=rf"instances_train\.json.*{named}"):
    load_source(write(tmp_path, text), "train")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_unicode_encodings_read(tmp_path, encoding):
  source = load_source(write(tmp_path, json.dumps(dataset()).encode(encoding)), "train")
  assert batch_of(source)["is_target"].sum() == 2


@pytest.mark.parametrize(
  ("outline", "named"),
  [
    ([], "no polygon"),
    ([[]], "fewer than 3 points"),
    ([[1, 2, 3, 4]], "fewer than 3 points"),
    ([[1, 2, 3, 4, 5, 6, 7]], "odd coordinate"),
    ([[[1, 1], [9, 1], [9, 9], [1, 9]]], "points as pairs"),
    ([[[1, 1], [9, 1], [9, 9], [1, 9], [1, 2], [1, 3]]], "points as pairs"),
    ([1, 1, 9, 1, 9, 9], "outside of a polygon"),
    ([[float("nan"), 1, 9, 9, 5, 5]], "NaN"),
    ([[float("inf"), 1, 9, 9, 5, 5]], "NaN"),
    ([[10**400, 1, 9, 9, 5, 5]], "NaN"),
    ([["1", 1, 9, 9, 5, 5]], "not numbers"),
    ([[1, 5, 9, 5, 30, 5]], "no pixel"),
    ([[1, 1, 2, 2, 3, 3]], "no pixel"),
    ([[100, 100, 200, 100, 200, 200]], "no pixel"),
    ([[5.1, 5.1, 5.2, 5.1, 5.2, 5.2, 5.1, 5.2]], "no pixel"),
    ([[5, 5, 10, 10, 15, 15, 20, 20, 25, 25]], "no pixel"),
    ([[5, 5, 20, 9, 30, 30, 30, 30, 20, 9, 5, 5]], "no pixel"),
    ([[5, 5.1, 50, 5.1, 50, 5.3, 5, 5.3]], "no pixel"),
    ([[-30, 5, 5, -30, -20, -20]], "no pixel"),
    ([[59.8, 5, 80, 5, 80, 30, 59.8, 30]], "no pixel"),
    ({"counts": [2400], "size": [60, 40]}, "run lengths"),
    ({"size": [40, 60]}, "run lengths"),
    ({"counts": [4, 2396], "size": [40.0, 60.0]}, "run lengths that are not of the image's size"),
    ({"counts": [], "size": [40, 60]}, "run lengths that do not add up"),
    ({"counts": [4], "size": [40, 60]}, "run lengths that do not add up"),
    ({"counts": [-5, 2405], "size": [40, 60]}, "run lengths that are not integers"),
    ({"counts": [0.5, 2399.5], "size": [40, 60]}, "run lengths that are not integers"),
    ({"counts": [2400], "size": [40, 60]}, "no area"),
    ({"counts": "zzzz", "size": [40, 60]}, "run lengths that do not add up"),
    ({"counts": "\xe9", "size": [40, 60]}, "run lengths that cannot be read"),
    ({"counts": "P[2", "size": [40, 60]}, "no area"),
    (None, "object without segmentation"),
  ],
)
def test_unusable_outline_dropped_with_masks(tmp_path, caplog, outline, named):
  """With masks the object is dropped, counted and named; without masks its box is kept."""
  data = dataset()
  data["annotations"][0]["segmentation"] = outline
  with caplog.at_level("WARNING"):
    source = load_source(write(tmp_path, data), "train")
  assert (
    f"1 x {named}" in caplog.text
    or f"1 x outline with {named}" in caplog.text.replace("fewer than 3 points or an ", "")
    or (named in caplog.text)
  )
  assert "annotation 1 of 1.jpg" in caplog.text
  batch = batch_of(source)
  assert batch["is_target"].sum(axis=1).tolist() == [0, 1]
  assert batch["masks"][1, 0].sum() == 400
  assert batch_of(source, BOXES)["is_target"].sum(axis=1).tolist() == [1, 1]


def test_outline_usable_polygons_kept(tmp_path):
  data = dataset()
  data["annotations"][0]["segmentation"] = [[1, 1], *SQUARE]
  assert batch_of(load_source(write(tmp_path, data), "train"))["masks"][0, 0].sum() == 400


def test_thin_outlines_kept(tmp_path):
  thin = [5, 5, 50, 5, 50, 6, 5, 6]
  for outline in ([[5, 5, 6, 5, 6, 6, 5, 6]], [thin], [[-9, -9, 2, -9, 2, 2, -9, 2]]):
    data = dataset()
    data["annotations"][0]["segmentation"] = outline
    assert batch_of(load_source(write(tmp_path, data), "train"))["masks"][0, 0].any()


@pytest.mark.parametrize("as_annotated", [False, True])
def test_empty_decoded_mask_dropped(monkeypatch, caplog, as_annotated):
  monkeypatch.setattr(detection, "_LOGGED", 1000)  # others may have been logged before
  fields = dict(is_crowd=[0, 0], area=[9, 9], ids=[7, 8])
  found = objects_example(encode(photo(40, 60)), 1, [[1, 1, 9, 9]] * 2, [1, 2], **fields)
  found["outlines"] = [[[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]], SQUARE]
  load = build_transforms([dict(name="load_objects", masks=True, as_annotated=as_annotated)])[0]
  with caplog.at_level("WARNING"):
    example = load(found, np.random.default_rng(0))
  assert example["labels"].tolist() == [2]
  assert example["masks"].sum() == 400
  assert "object 7" in caplog.text


@pytest.mark.parametrize(
  ("isthing", "stuff_from", "warned"),
  [((1, 1), 3, False), ((1, 0), 2, False), ((None, 0), 2, True), ((None, None), None, True)],
)
def test_stuff_from(tmp_path, caplog, isthing, stuff_from, warned):
  data = dataset()
  data["categories"] = [
    {"id": i, "name": f"{i}"} | ({} if thing is None else {"isthing": thing})
    for i, thing in enumerate(isthing, start=1)
  ]
  segments = [{"id": 5, "category_id": 1}]
  data["annotations"] = [
    {"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in (1, 2)
  ]
  write(tmp_path, data)
  (tmp_path / "annotations/instances_train.json").rename(
    tmp_path / "annotations/panoptic_train.json"
  )
  (tmp_path / "panoptic_train").mkdir()
  with caplog.at_level("WARNING"):
    source = load_source(f"coco:{tmp_path}", "train", panoptic=True)
  assert source.info.stuff_from == stuff_from
  assert ("category without isthing" in caplog.text) == warned


def test_outline_coordinates_clipped(tmp_path):
  data = dataset()
  data["annotations"][0]["segmentation"] = [[10, 5, 1e12, 5, 1e12, 25, 10, 25]]
  masks = batch_of(load_source(write(tmp_path, data), "train"))["masks"]
  assert masks[0, 0, 10].sum() == 50


@pytest.mark.parametrize("far", [1e3, 1e12, 1e14])
def test_far_outline_keeps_its_edges(tmp_path, far):
  data = dataset()
  below, above = [5, 5, 5, far, far, far], [5, 5, far, 5, far, far]
  for found, outline in zip(data["annotations"], (below, above), strict=True):
    found["segmentation"] = [outline]
  masks = batch_of(load_source(write(tmp_path, data), "train"))["masks"][:, 0]
  y, x = np.indices((40, 60))
  inside = (np.minimum(x, y) >= 5) & (x != y)
  assert (masks[0] == (y > x))[inside].all()
  assert (masks[1] == (y < x))[inside].all()
  assert not masks[:, :4].any()


def test_outline_far_outside_dropped(tmp_path, caplog):
  data = dataset()
  data["annotations"][0]["segmentation"] = [[1e9, 5, 2e9, 5, 2e9, 1e9]]
  with caplog.at_level("WARNING"):
    load_source(write(tmp_path, data), "train")
  assert "1 x outline with no pixel in its image (annotation 1 of 1.jpg)" in caplog.text


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_decomposed_accents_found(tmp_path, forms):
  in_file, on_disk = (unicodedata.normalize(form, "\u00e4/\u00e9.jpg") for form in forms)
  data = dataset()
  data["images"][0]["file_name"] = in_file
  name = write(tmp_path, data)
  (tmp_path / "train" / on_disk).parent.mkdir()
  (tmp_path / "train" / "1.jpg").rename(tmp_path / "train" / on_disk)
  source = load_source(name, "train")
  assert source.missing() == []
  assert batch_of(source)["is_target"].sum() == 2


def corner_boxes(data, *, outside):
  """Gives 20 boxes by corners, of which this many would end outside of their image."""
  boxes = [[30, 20, 55, 35] if i < outside else [5 + i, 5, 30 + i, 15] for i in range(20)]
  data["annotations"] = [objects(id=i, bbox=box, area=250) for i, box in enumerate(boxes)]


def test_masks_false_without_outlines(tmp_path):
  data = dataset()
  for found in data["annotations"]:
    found["segmentation"] = []
  source = load_source(write(tmp_path, data), "train")
  assert batch_of(source, BOXES)["is_target"].sum() == 2
  with pytest.raises(ValueError, match="masks=False"):
    batch_of(source)


def test_compressed_run_lengths_accepted():
  rng = np.random.default_rng(0)
  for density in (0, 0.01, 0.5, 1):
    for height, width in rng.integers(1, 200, (20, 2)).tolist():
      mask = np.asfortranarray(rng.random((height, width)) < density, np.uint8)
      outline = {"size": [height, width], "counts": run_lengths.encode(mask)["counts"].decode()}
      problem = _run_lengths_problem(outline, [height, width])
      assert problem == ("" if mask.any() else "no area in its image")


@pytest.mark.parametrize("side", [float("nan"), float("inf"), 1e300, 10**400, -5])
def test_invalid_boxes_dropped(tmp_path, caplog, side):
  data = dataset()
  data["annotations"][0]["bbox"] = [1, 1, side, 3]
  with caplog.at_level("WARNING"):
    source = load_source(write(tmp_path, data), "train")
  assert "1 x bbox with NaN, numbers beyond 1e15 or a negative side" in caplog.text
  assert source.info.num_objects == 1  # in scoring, too
  assert batch_of(source)["is_target"].sum(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize("file", ["train\\1.jpg", "https://a/1.jpg"])
def test_file_name_of_other_kind_logged(tmp_path, caplog, file):
  data = dataset()
  data["images"][0]["file_name"] = file
  with caplog.at_level("WARNING"):
    assert load_source(write(tmp_path, data), "train").missing() == [0]
  assert (
    f"1 x file_name with a backslash or of a URL; expected a path below the images ({file})"
    in (caplog.text)
  )


def test_iscrowd_text_converted(tmp_path, caplog):
  data = dataset()
  for found, crowd in zip(data["annotations"], ("0", "1"), strict=True):
    found["iscrowd"] = crowd
  with caplog.at_level("WARNING"):
    source = load_source(write(tmp_path, data), "train")
  assert "2 x iscrowd that is text" in caplog.text
  assert batch_of(source)["is_target"].sum(axis=1).tolist() == [1, 0]


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda d: d.update(annotations=[]), "annotations is empty"),
    (lambda d: [a.update(iscrowd=1) for a in d["annotations"]], "crowds only"),
    (
      lambda d: [a.update(bbox=[30, 20, 55, 35]) for a in d["annotations"]],
      "left, top, right, bottom.*2 of 2 boxes",
    ),
    (lambda d: corner_boxes(d, outside=3), "left, top, right, bottom.*[^0]0? of 20 boxes"),
    (
      lambda d: d["annotations"].__setitem__(
        slice(None), [objects(id=i, bbox=[i, 5, i + 20, 15], area=200) for i in range(1, 9)]
      ),
      "left, top, right, bottom.* 8 areas",
    ),
    (first(bbox=[50, 5, 30, 9]), "1 x bbox that reaches out of its image.*annotation 1 of 1.jpg"),
    (first(bbox=[-9, 5, 30, 9]), "1 x bbox that reaches out of its image.*annotation 1 of 1.jpg"),
    (lambda d: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in d["annotations"]], r"2 x .*\[0, 1\]"),
    (first(bbox=[0.1, 0.1, 0.5, 1.0001]), r"1 x bbox in \[0, 1\].*annotation 1 of 1.jpg"),
    (lambda d: d["categories"].append({"id": 1, "name": "cat"}), "category that is listed twice"),
    (lambda d: d["images"][1].update(file_name="1.jpg"), "image file that is listed twice"),
    (first(area="big"), "area that is not a number"),
    (first(area=10**400), "area that is not a number"),
    (first(area=-5), "area that is not a number of at least 0"),
    (
      lambda d: d["annotations"].extend([{**a, "id": a["id"] + 9} for a in d["annotations"]]),
      r"2 x object that repeats another.*annotation 10 of 1.jpg, annotation 11 of 2.jpg",
    ),
  ],
)
def test_suspicious_file_warns(tmp_path, caplog, change, named):
  data = dataset()
  change(data)
  with caplog.at_level("WARNING"):
    source = load_source(write(tmp_path, data), "train")
  assert batch_of(source, BOXES)["image"].shape == (2, 40, 60, 3)
  assert re.search(named, caplog.text)


@pytest.mark.parametrize("annotations", [[], [objects(iscrowd=1)]])
def test_evaluation_without_objects_raises(tmp_path, annotations):
  source = write(tmp_path, dataset() | {"annotations": annotations})

  def opened(spec):
    return load_source(source, spec["split"])

  sections = {"val": {"split": "train[:50%]"}}
  with pytest.raises(ValueError, match=r"data\.eval\.val: coco:"):
    _open_evaluations(opened, sections, DatasetInfo("train", 2))


@pytest.mark.parametrize("ids", [(2**40, 2**41), ("a", "b"), (2**40, 3), (2**70, "c")])
def test_image_ids_large_or_text(tmp_path, ids):
  data = dataset()
  for i, number in enumerate(ids):
    data["images"][i]["id"] = data["annotations"][i]["image_id"] = number
  source = load_source(write(tmp_path, data), "train")
  assert [source[i]["file_image_id"] for i in range(2)] == list(ids)
  batch = batch_of(source)
  assert batch["image_id"].tolist() == [0, 1]
  assert "file_image_id" not in batch
  assert batch["is_target"].sum(axis=1).tolist() == [1, 1]


def test_unlisted_segment_colors_void(caplog):
  image = np.zeros((2, 3, 3), np.uint8)
  image[0, :, 0] = 7, 9, 9
  example = {"object_ids": np.array([7, 8]), "image_id": 5}
  with caplog.at_level("WARNING"):
    segments = decode_segments(encode(image, "PNG"), example)
  assert segments.tolist() == [[0, -1, -1], [-1, -1, -1]]
  assert re.search(r"image 5: 1 colors .*2 pixels; ids 9", caplog.text)


def test_max_objects_from_data(tmp_path):
  data = dataset()
  data["annotations"] += [objects(id=i) for i in range(3, 153)]
  source = load_source(write(tmp_path, data), "train")
  assert source.info.max_objects == 151
  assert batch_of(source)["is_target"].shape == (2, 151)


@pytest.mark.parametrize("frame", ["auto", "upright", "stored"])
def test_image_size_mismatch_logged(tmp_path, caplog, frame):
  data = dataset()
  data["images"][1].update(height=20, width=30)
  load_source(write(tmp_path, data), "train", exif_frame=frame)
  assert re.search(r"1 images .*2\.jpg: \(40, 60\) for \(20, 30\)", caplog.text)


class TestRotatedImages:
  """Images with an EXIF rotation, annotated in either frame."""

  @pytest.mark.parametrize(
    ("turn", "frame"), [*((turn, "stored") for turn in range(2, 9)), (3, "upright"), (6, "upright")]
  )
  def test_boxes_and_masks_rotated_with_image(self, tmp_path, caplog, turn, frame):
    mask = np.zeros((40, 60), bool)
    mask[5:25, 10:30] = True
    data, chosen = dataset(), {}
    turned = orient(mask, turn)
    if frame == "upright":
      rows, columns = np.nonzero(turned)
      left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
      box = [int(left), int(top), int(right - left), int(bottom - top)]
      polygon = [float(x) for x in (left, top, right, top, right, bottom, left, bottom)]
      for image, found in zip(data["images"], data["annotations"], strict=True):
        image.update(height=turned.shape[0], width=turned.shape[1])
        found.update(bbox=box, segmentation=[polygon])
    elif turn < 5:
      chosen = {"exif_frame": "stored"}  # the size is ambiguous
    caplog.set_level("INFO", logger="absl")
    source = load_source(write(tmp_path, data, turn), "train", **chosen)
    assert f"2 images are rotated by EXIF; assuming annotations in the {frame} frame" in (
      caplog.text
    )
    assert "cannot be used" not in caplog.text
    specs = [
      dict(name="load_objects", masks=True, run_lengths=100, as_annotated=True),
      dict(name="pad_objects"),
    ]
    transforms = build_transforms(specs)
    with train_batches(source, transforms, batch_size=2, seed=0, buckets=((64, 64),)) as batches:
      batch = next(batches)
    height, width = turned.shape
    assert batch["original_size"].tolist() == [[height, width]] * 2
    assert source.image_size(0) == (height, width)
    np.testing.assert_array_equal(batch["masks"][0, 0, :height, :width], turned)
    rows, columns = np.nonzero(turned)
    center = [(columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2]
    np.testing.assert_allclose(batch["boxes_cxcywh"][0, 0, :2] * (width, height), center)
    assert len(batch["run_lengths"][0].tobytes().rstrip(b"\0").splitlines()) == 1


class TestPanoptic:
  def write(self, root, categories, segments, images=2):
    ids = np.zeros((40, 60), np.uint8)
    ids[:20, :30] = 1
    ids[20:, 30:] = 2
    data = dataset()
    data["categories"] = categories
    data["annotations"] = [
      {"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in (1, 2)[:images]
    ]
    write(root, data)
    folder = root / "annotations" / "panoptic_train"
    folder.mkdir()
    for i in (1, 2):
      Image.fromarray(np.dstack([ids, ids * 0, ids * 0])).save(folder / f"{i}.png")
    file = root / "annotations" / "panoptic_train.json"
    file.write_text(json.dumps(data))
    return load_source(f"coco:{root}", "train", panoptic=True)

  CATEGORIES = (
    {"id": 1, "name": "cat", "isthing": 1},
    {"id": 2, "name": "sky", "isthing": 0},
  )
  SEGMENTS = (
    {"id": 1, "category_id": 1, "area": 600, "bbox": [9, 9, 9, 9], "iscrowd": 0},
    {"id": 2, "category_id": 2, "area": 600, "bbox": [9, 9, 9, 9], "iscrowd": 0},
  )

  def test_boxes_from_segments(self, tmp_path):
    """The official code's boxes end at the last pixel."""
    source = self.write(tmp_path, self.CATEGORIES, self.SEGMENTS)
    (load,) = build_transforms([dict(name="load_objects")])
    example = load(source[0], np.random.default_rng(0))
    assert example["boxes_xyxy"].tolist() == [[0, 0, 29, 19], [30, 20, 59, 39]]

  def test_stuff_from_isthing(self, tmp_path):
    assert self.write(tmp_path, self.CATEGORIES, self.SEGMENTS).info.stuff_from == 2

  def test_isthing_numeric_text_accepted(self, tmp_path):
    categories = [{**c, "isthing": str(c["isthing"])} for c in self.CATEGORIES]
    assert self.write(tmp_path, categories, self.SEGMENTS).info.stuff_from == 2

  def test_isthing_invalid_raises(self, tmp_path):
    with pytest.raises(ValueError, match=r"isthing.*id 1: 'yes'"):
      self.write(tmp_path, [{**self.CATEGORIES[0], "isthing": "yes"}], self.SEGMENTS)

  @pytest.mark.parametrize("size", [0, 60_000])
  def test_undecodable_segment_image_skipped(self, tmp_path, caplog, size):
    source = self.write(tmp_path, self.CATEGORIES, self.SEGMENTS)
    png = tmp_path / "annotations" / "panoptic_train" / "1.png"
    header = struct.pack(">4sIIBBBBB", b"IHDR", size, size, 8, 2, 0, 0, 0)
    begin = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header))
    png.write_bytes(begin if size else b"")
    specs = [
      dict(name="load_objects", segment_map=True, as_annotated=True),
      dict(name="pad_objects"),
    ]
    batches = eval_batches(source, build_transforms(specs), batch_size=2, on_corrupt="skip")
    assert next(iter(batches))["mask"].tolist() == [False, True]
    assert str(png) in caplog.text

  def test_jpeg_segment_image_raises(self, tmp_path):
    source = self.write(tmp_path, self.CATEGORIES, self.SEGMENTS)
    (tmp_path / "annotations" / "panoptic_train" / "1.png").write_bytes(encode(photo(40, 60)))
    specs = [dict(name="load_objects", segment_map=True, as_annotated=True)]
    with pytest.raises(ValueError, match=r"1\.png: segment image is JPEG"):
      batch_of(source, build_transforms([*specs, dict(name="pad_objects")]))

  def test_stuff_ids_below_things_raise(self, tmp_path):
    categories = [{**c, "isthing": 1 - c["isthing"]} for c in self.CATEGORIES]
    with pytest.raises(ValueError, match="category 2 is a thing"):
      self.write(tmp_path, categories, self.SEGMENTS)

  def test_image_without_annotation_dropped(self, tmp_path, caplog):
    source = self.write(tmp_path, self.CATEGORIES, self.SEGMENTS, images=1)
    assert len(source) == 1
    assert "1 x image without panoptic annotation, left out (2.jpg)" in caplog.text

  def test_empty_segments_dropped(self, tmp_path):
    lost = {**self.SEGMENTS[0], "id": 77}
    source = self.write(tmp_path, self.CATEGORIES, [lost, *self.SEGMENTS])
    specs = [
      dict(name="load_objects", masks=True, segment_map=True, as_annotated=True),
      dict(name="pad_objects"),
    ]
    batch = batch_of(source, build_transforms(specs))
    assert batch["labels"][0].tolist() == [1, 2, 0]
    assert sorted(np.unique(batch["segment_map"][0])) == [-1, 0, 1]
    np.testing.assert_array_equal(batch["masks"][0, 1], batch["segment_map"][0] == 1)

  def test_duplicate_segment_ids_raise(self, tmp_path):
    with pytest.raises(ValueError, match=r"segment 1 of 1\.jpg"):
      self.write(tmp_path, self.CATEGORIES, [self.SEGMENTS[0], self.SEGMENTS[0]])
