"""torchvision's R-CNNs with the same weights: each stage, and the detections."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faster_coco_eval.core import mask as run_lengths

from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.inference.base import Options, create_predictor
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.systems.rcnn.masks import paste_masks

pytestmark = pytest.mark.parity

SIDE = 128


@pytest.fixture(scope="module", autouse=True)
def _torchvision():
  """Imports it late: with an import above, each worker would keep 650 MB from collection on."""
  global torch, torchvision
  torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")


def random_network(kind):
  """torchvision's network with random weights, norm statistics and output layers."""
  torch.manual_seed(0)
  model = getattr(torchvision.models.detection, f"{kind}_resnet50_fpn")(
    weights=None, weights_backbone=None, num_classes=7, min_size=SIDE, max_size=SIDE
  )
  with torch.no_grad():
    for name, buffer in model.named_buffers():
      if name.endswith("running_var"):
        buffer.uniform_(1.0, 3.0)
      elif name.endswith(("running_mean", "bias")):
        buffer.normal_(0, 0.1)
    model.rpn.head.cls_logits.weight.normal_(0, 0.05)
    model.rpn.head.bbox_pred.weight.normal_(0, 0.02)
    model.roi_heads.box_predictor.cls_score.weight.normal_(0, 0.1)
    model.roi_heads.box_predictor.bbox_pred.weight.normal_(0, 0.05)
  return model.eval()


@pytest.fixture(scope="module")
def theirs():
  return random_network("maskrcnn")


@pytest.fixture(scope="module")
def path(theirs, tmp_path_factory):
  file = tmp_path_factory.mktemp("rcnn") / "maskrcnn_resnet50_fpn_coco.pth"
  torch.save(theirs.state_dict(), file)
  return str(file)


@pytest.fixture(scope="module")
def random_image():
  return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def test_every_stage_equals_torchvision(theirs, path, random_image):
  loaded = load_pretrained(path)
  assert (loaded.model.num_classes, loaded.model.mask_head["num_convs"]) == (6, 4)
  images = loaded.preprocess.at_size((SIDE, SIDE))([random_image])
  with torch.no_grad():
    features = theirs.backbone(torch.from_numpy(images).permute(0, 3, 1, 2))
    logits, deltas = theirs.rpn.head(list(features.values()))
  proposals = jax.jit(lambda v, x: loaded.model.apply(v, x, method="propose"))(
    loaded.variables, images
  )
  for ours, expected in zip(proposals.pyramid, features.values(), strict=False):
    expected = expected.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
  flat = [np.concatenate([x.permute(0, 2, 3, 1).reshape(-1).numpy() for x in part])
          for part in (logits, deltas)]  # fmt: skip
  np.testing.assert_allclose(proposals.objectness[0], flat[0], atol=1e-4 * np.abs(flat[0]).max())
  np.testing.assert_allclose(
    proposals.deltas[0].reshape(-1), flat[1], atol=1e-4 * np.abs(flat[1]).max()
  )
  anchors = theirs.rpn.anchor_generator(
    torchvision.models.detection.image_list.ImageList(
      torch.zeros(1, 3, SIDE, SIDE), [(SIDE, SIDE)]
    ),
    list(features.values()),
  )[0]
  np.testing.assert_array_equal(proposals.anchors_xyxy, anchors.numpy())


def test_heads_equal_torchvision(theirs, path):
  loaded = load_pretrained(path)
  rng = np.random.default_rng(1)
  pyramid = [
    rng.normal(size=(1, SIDE // s, SIDE // s, 256)).astype(np.float32) for s in (4, 8, 16, 32)
  ]
  corner = rng.uniform(0, 60, (9, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(8, 60, (9, 2))], 1).astype(np.float32)
  names = ["0", "1", "2", "3"]
  features = {
    n: torch.from_numpy(x).permute(0, 3, 1, 2) for n, x in zip(names, pyramid, strict=True)
  }
  heads = theirs.roi_heads
  with torch.no_grad():
    rois = [torch.from_numpy(boxes)]
    crops = heads.box_roi_pool(features, rois, [(SIDE, SIDE)])
    logits, deltas = heads.box_predictor(heads.box_head(crops))
    crops = heads.mask_roi_pool(features, rois, [(SIDE, SIDE)])
    masks = heads.mask_predictor(heads.mask_head(crops))
  inputs = (loaded.variables, [jnp.asarray(x) for x in pyramid], jnp.asarray(boxes)[None])
  ours, boxes_of = jax.jit(lambda v, p, b: loaded.model.apply(v, p, b, method="classify"))(*inputs)
  order = [1, 2, 3, 4, 5, 6, 0]  # ours has the background last
  for one, other in (
    (ours[0], logits.numpy()[:, order]),
    (boxes_of[0], deltas.reshape(9, 7, 4).numpy()[:, order]),
  ):
    np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())
  mine = jax.jit(lambda v, p, b: loaded.model.apply(v, p, b, method="segment"))(*inputs)
  expected = masks.permute(0, 2, 3, 1).numpy()[..., order]
  np.testing.assert_allclose(mine[0], expected, atol=1e-4 * np.abs(expected).max())


def test_detections_equal_torchvision(theirs, path):
  """Images of odd sides: the pyramid's last map has 3 columns instead of 5, and closer anchors."""
  trained = load(path)
  rng = np.random.default_rng(0)
  pictures = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((97, 143, 3), (97, 120, 3))]
  theirs.transform.min_size, theirs.transform.max_size = (97,), 300
  with torch.no_grad():
    expected = theirs([torch.from_numpy(x).permute(2, 0, 1) / 255 for x in pictures])
  sizes = np.array([x.shape[:2] for x in pictures], np.int32)
  batch = {"image": np.zeros((2, 97, 143, 3), np.uint8), "image_size": sizes}
  for image, pixels in zip(batch["image"], pictures, strict=True):
    image[:, : pixels.shape[1]] = pixels
  detections = jax.device_get(jax.jit(trained.task.predict)(trained.variables, batch))
  for index, known in enumerate(expected):
    count = len(known["scores"])
    assert count > 5
    ours = {key: value[index][:count] for key, value in detections.items()}
    assert int(detections["is_object"][index].sum()) == count
    np.testing.assert_allclose(ours["scores"], known["scores"], atol=1e-4)
    np.testing.assert_array_equal(ours["labels"] + 1, known["labels"])
    np.testing.assert_allclose(ours["boxes_xyxy"], known["boxes"], atol=0.02)
    size = pictures[index].shape[:2]
    masks = paste_masks(ours["box_masks"], ours["boxes_xyxy"], size, convention="torchvision")
    differ = masks != (known["masks"][:, 0].numpy() > 0.5)
    assert differ.sum() <= 1e-4 * masks.sum()  # values at the threshold


SIZES = [(333, 500), (97, 641), (801, 333), (500, 334), (67, 131), (641, 480)]


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn"])
def test_predictions_of_odd_image_sizes_equal_torchvision(kind, tmp_path):
  """Compares boxes and masks in the image's pixels; 334 is scaled to 95 of 96 pixels."""
  network = random_network(kind)
  network.transform.min_size, network.transform.max_size = (96,), 160
  torch.save(network.state_dict(), tmp_path / "rcnn.pth")
  preprocess = load_pretrained(str(tmp_path / "rcnn.pth")).preprocess.at_size((96, 96))
  preprocess = dataclasses.replace(preprocess, max_side=160)
  trained = dataclasses.replace(
    load(str(tmp_path / "rcnn.pth")), prepare=lambda image: {"image": preprocess.resize(image)}
  )
  predict = create_predictor(trained, Options(threshold=0.05))
  rng = np.random.default_rng(0)
  for size in SIZES:
    small = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    image = np.kron(small, np.ones((9, 9, 1), np.uint8))[: size[0], : size[1]]
    with torch.no_grad():
      (expected,) = network([torch.from_numpy(image).permute(2, 0, 1) / 255])
    resized = preprocess.resized_size(*size)
    assert resized == tuple(network.transform.resize(torch.zeros(3, *size))[0].shape[1:])
    objects = predict(image).record["objects"]
    assert len(objects) == len(expected["scores"]) > 5, size
    ours = {key: np.array([entry[key] for entry in objects]) for key in ("score", "label", "box")}
    np.testing.assert_allclose(ours["score"], expected["scores"], atol=1e-4, err_msg=str(size))
    np.testing.assert_array_equal(ours["label"] + 1, expected["labels"], err_msg=str(size))
    scale = max(size) / max(resized)
    np.testing.assert_allclose(ours["box"], expected["boxes"], atol=0.02 * scale, err_msg=str(size))
    if kind == "maskrcnn":
      masks = np.stack([run_lengths.decode(entry["mask"]) for entry in objects]).astype(bool)
      differ = masks != (expected["masks"][:, 0].numpy() > 0.5)
      assert differ.sum() <= 1e-3 * masks.sum(), size  # values at the threshold


def test_export_loads_in_torchvision(theirs, path, tmp_path):
  export.write(load_pretrained(path), "pth-torchvision", str(tmp_path / "again.pth"))
  again = torch.load(tmp_path / "again.pth", weights_only=True)
  theirs.load_state_dict(again)  # strict, except for batch counters, which frozen norms lack
  original = torch.load(path, weights_only=True)
  assert again.keys() == {key for key in original if not key.endswith("num_batches_tracked")}
  for key, array in again.items():
    assert torch.equal(array, original[key]), key
