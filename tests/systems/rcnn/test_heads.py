"""Heads against the official code with its weights; feature pyramids against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from tests.variables import random_variables
from vit_jax_zoo.nn.resnet import ResNet
from vit_jax_zoo.systems.rcnn import task as losses
from vit_jax_zoo.systems.rcnn import weights as detectron
from vit_jax_zoo.systems.rcnn.heads import (
  BoxHead,
  BoxOutputs,
  FeaturePyramid,
  MaskHead,
  RegionProposalHead,
)
from vit_jax_zoo.weights import key_map as table
from vit_jax_zoo.weights.load import flatten_variables, unflatten_variables


@pytest.fixture(scope="module")
def weights():
  return load_file(golden_folder("fpt_det_a") / "weights.safetensors")


def to_nhwc(maps):
  return jnp.moveaxis(jnp.asarray(maps), 1, -1)


def load_variables(module, name, inputs, rows, weights, keys, **fields):
  """Returns the module's variables from the published arrays whose keys begin with `keys`."""
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), inputs, **fields))
  tree = {kind: {name: leaves} for kind, leaves in shapes.items()}
  own = {k: v for k, v in weights.items() if k.startswith(keys)}
  expected_shapes = {
    path: leaf.shape for path, leaf in flatten_variables({"params": {}, **tree}).items()
  }
  flat = table.read(detectron.unfold_norms(own), rows, expected_shapes, source="the fixture")
  again = detectron.fold_norms(table.write(flat, rows))
  assert set(again) == set(own)
  for key, array in own.items():
    np.testing.assert_array_equal(again[key], array)
  variables = unflatten_variables(flat, {"params": {}, **tree})
  return {kind: leaves[name] for kind, leaves in variables.items() if leaves}


def test_backbone_equals_official_code(load_golden, weights):
  config, inputs, outputs = load_golden("fpt_det_a")
  width = config["caffe_resnet_width"]
  body = ResNet(
    blocks=tuple(config["res_blocks"]), widths=tuple(width * 2**i for i in range(4)),
    norm="frozen_batch_norm", stride_in_1x1=True,
  )  # fmt: skip
  image = to_nhwc(inputs["image"])[..., ::-1]  # to RGB
  rows = detectron.backbone_rows()
  variables = load_variables(body, "backbone", image, rows, weights, "Conv_Body.")
  maps = jax.jit(body.apply)(variables, image)
  for i in range(2, 6):
    expected = to_nhwc(outputs[f"body_res{i}"])
    np.testing.assert_allclose(maps[f"c{i}"], expected, atol=2e-5 * np.abs(expected).max())


def test_rpn_equals_official_code(load_golden, weights):
  _, inputs, outputs = load_golden("fpt_det_a")
  head, features = RegionProposalHead(3), [to_nhwc(inputs["rpn_feat"])]
  rows = detectron.proposal_rows()
  variables = load_variables(head, "proposal_head", features, rows, weights, "RPN.")
  logits, deltas = jax.jit(head.apply)(variables, features)
  np.testing.assert_allclose(logits, to_nhwc(outputs["rpn_cls_logits"]).reshape(1, -1), atol=1e-5)
  expected = to_nhwc(outputs["rpn_bbox_pred"]).reshape(1, -1, 4)
  np.testing.assert_allclose(deltas, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("name", "convs", "dense"), [("Box_Head_2mlp", 0, 2), ("Box_Head_Xconv1fc", 4, 1)]
)
def test_box_heads_equal_official_code(load_golden, weights, name, convs, dense):
  config, inputs, outputs = load_golden("fpt_det_a")
  crops = [to_nhwc(inputs[f"crops7_{level}"])[None] for level in range(4)]
  head = BoxHead(num_convs=convs, num_dense=dense, width=config["mlp_dim"], norm="group_norm")
  rows = detectron.box_rows(convs, prefix=name)
  variables = load_variables(head, "box_head", crops, rows, weights, f"{name}.")
  got = jax.jit(head.apply)(variables, crops)[0]
  np.testing.assert_allclose(got, outputs[name], rtol=2e-5, atol=1e-5)


def outputs_of(load_golden, weights):
  """Returns logits and deltas from the official vectors; the background class is moved last."""
  config, _, expected = load_golden("fpt_det_a")
  for vectors in ("Box_Head_2mlp", "Box_Head_Xconv1fc"):
    module = BoxOutputs(config["num_classes"] - 1)
    inputs = jnp.asarray(expected[vectors])[None]
    variables = load_variables(
      module, "box_outputs", inputs, detectron.output_rows(), weights, "Box_Outs."
    )
    logits, deltas = module.apply(variables, inputs)
    if np.allclose(np.roll(logits[0], 1, axis=1), expected["cls_score"], atol=1e-4):
      return logits[0], deltas[0]
  raise AssertionError("neither head's vectors lead to the official scores")


def test_box_outputs_and_losses_equal_official_code(load_golden, weights):
  _, inputs, expected = load_golden("fpt_det_a")
  logits, deltas = outputs_of(load_golden, weights)
  np.testing.assert_allclose(np.roll(logits, 1, axis=1), expected["cls_score"], atol=1e-5)
  probabilities = np.roll(jax.nn.softmax(logits), 1, axis=1)
  np.testing.assert_allclose(probabilities, expected["cls_prob"], atol=1e-5)
  flat = np.roll(deltas, 1, axis=1).reshape(len(deltas), -1)
  np.testing.assert_allclose(flat, expected["bbox_pred"], atol=1e-5)
  labels = jnp.asarray((inputs["labels"] - 1) % logits.shape[1])
  loss = jnp.mean(losses.class_loss(logits, labels))
  np.testing.assert_allclose(loss, expected["loss_cls"][0], rtol=1e-5)
  accuracy = np.mean(np.argmax(logits, axis=1) == labels)
  np.testing.assert_allclose(accuracy, expected["accuracy_cls"][0])
  errors = inputs["bbox_inside"] * (flat - inputs["bbox_targets"])
  loss = official_reduction(errors, inputs["bbox_outside"], 1 / 3)
  np.testing.assert_allclose(loss, expected["loss_bbox"][0], rtol=1e-5)


def official_reduction(errors, weights, beta):
  """The official reduction: weighted per coordinate, summed, divided by the number of rows."""
  each = losses.smooth_l1(jnp.asarray(errors)[..., None], beta)
  return float(jnp.sum(each * weights) / len(errors))


def test_smooth_l1_equals_official_code(load_golden):
  _, inputs, outputs = load_golden("fpt_det_a")
  for beta, name in ((1.0, "1.000"), (1 / 3, "0.333"), (1 / 9, "0.111")):
    predicted, targets, inside, outside = (inputs[f"sl1_{name}_{i}"] for i in range(4))
    loss = official_reduction(inside * (predicted - targets), outside, beta)
    np.testing.assert_allclose(loss, outputs[f"smooth_l1_{name}"][0], rtol=1e-5)
  absolute = losses.smooth_l1(jnp.asarray([[-2.0, 0.5]]), 0.0)
  np.testing.assert_allclose(absolute, [2.5])


def test_mask_head_and_loss_equal_official_code(load_golden, weights):
  config, inputs, outputs = load_golden("fpt_det_a")
  crops = [to_nhwc(inputs[f"mask_crops_{level}"])[None] for level in range(4)]
  head = MaskHead(
    num_classes=config["num_classes"] - 1, width=config["mask_dim"], norm="group_norm", fused=True
  )
  rows = detectron.mask_rows(config["mask_xform_resolution"])
  variables = load_variables(head, "mask_head", crops, rows, weights, ("Mask_Head.", "Mask_Outs."))
  logits, state = jax.jit(lambda v, x: head.apply(v, x, mutable="intermediates"))(variables, crops)
  intermediates = state["intermediates"]
  np.testing.assert_allclose(intermediates["upsampled"][0], to_nhwc(outputs["mask_fcn"]), atol=2e-5)
  np.testing.assert_allclose(intermediates["fused"][0], outputs["mask_ff"], atol=2e-5)
  expected = np.roll(to_nhwc(outputs["mask_logits"]), -1, axis=-1)
  np.testing.assert_allclose(logits[0], expected, atol=2e-5)
  targets = inputs["mask_targets"].reshape(3, config["num_classes"], *expected.shape[1:3])
  each = []
  for box, target in enumerate(targets):
    for label in range(config["num_classes"]):
      if (target[label] >= 0).all():
        mask = losses.select_class(
          logits[0, box], jnp.asarray((label - 1) % config["num_classes"]), -1
        )
        each.append(float(losses.mask_loss(mask, jnp.asarray(target[label] == 1))))
  valid = (targets >= 0).sum() / targets[0, 0].size
  if len(each) == valid:  # the fixture ignores only whole masks
    np.testing.assert_allclose(np.mean(each), outputs["loss_mask"][0], rtol=1e-5)
  else:
    raw = np.asarray(jnp.moveaxis(logits[0], -1, 1))
    raw = np.roll(raw, 1, axis=1)
    cross = np.logaddexp(0, raw) - raw * (targets == 1)
    np.testing.assert_allclose(cross[targets >= 0].mean(), outputs["loss_mask"][0], rtol=1e-5)


def test_heads_pool_one_or_all_levels():
  rng = np.random.default_rng(0)
  crops = [jnp.asarray(rng.normal(size=(2, 3, 4, 4, 8)), jnp.float32) for _ in range(2)]
  for fields in ({}, {"num_convs": 2, "num_dense": 1}):
    head = BoxHead(width=16, **fields)
    one = jax.eval_shape(head.init_with_output, jax.random.key(0), crops[:1])[0]
    assert one.shape == (2, 3, 16)
    both, variables = jax.eval_shape(head.init_with_output, jax.random.key(0), crops)
    assert both.shape == (2, 3, 16)
    assert {"first_0", "first_1"} <= set(variables["params"])
  mask = MaskHead(num_classes=5, num_convs=2, width=8, dtype="bfloat16")
  logits = jax.eval_shape(mask.init_with_output, jax.random.key(0), crops[:1])[0]
  assert logits.shape == (2, 3, 8, 8, 6)
  assert logits.dtype == jnp.float32


def test_pyramid_propagates_coarse_levels_only_top_down():
  rng = np.random.default_rng(0)
  maps = [jnp.asarray(rng.normal(size=(1, s, s, 5)), jnp.float32) for s in (9, 5, 3)]
  changed = [*maps[:2], maps[2] + 1]
  for top_down in (True, False):
    neck = FeaturePyramid(width=6, top_down=top_down)
    variables, apply = random_variables(neck.init, maps), jax.jit(neck.apply)
    before, after = apply(variables, maps), apply(variables, changed)
    assert [x.shape for x in before] == [(1, s, s, 6) for s in (9, 5, 3)]
    moved = [np.abs(np.asarray(a) - b).max() > 1e-6 for a, b in zip(before, after, strict=True)]
    assert moved == [top_down, top_down, True]
