"""DETR's training curve against the official code: loss terms, matchings, parameters."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from tests import command
from tests.conftest import golden_folder
from tests.systems.detr.reference import model_of, variables_of
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.training.optim import create_optimizer
from vit_jax_zoo.training.train_step import create_state, make_train_step

FREEZE = {
  "train_detr_a": [("backbone/(stem|c2_).*", {"frozen": True})],
  "train_detr_panoptic_a": [(r"(?!mask_).*", {"frozen": True})],
}
TERMS = {
  "class_loss": "loss_ce",
  "box_loss": "loss_bbox",
  "giou_loss": "loss_giou",
  "mask_loss": "loss_mask",
  "dice_loss": "loss_dice",
}


def read_batches(inputs, count, with_masks):
  """Returns the fixture's batches, targets padded to one count."""
  most = max(len(v) for k, v in inputs.items() if k.startswith("labels_"))
  batches = []
  for b in range(count):
    images = np.moveaxis(inputs[f"images_{b}"], 1, -1)
    rows = len(images)
    batch = {
      "image": images,
      "image_size": inputs[f"sizes_{b}"],
      "boxes_cxcywh": np.zeros((rows, most, 4), np.float32),
      "labels": np.zeros((rows, most), np.int32),
      "is_target": np.zeros((rows, most), bool),
    }
    if with_masks:
      batch["masks"] = np.zeros((rows, most, *images.shape[1:3]), bool)
    for row in range(rows):
      labels = inputs[f"labels_{b}_{row}"]
      batch["labels"][row, : len(labels)] = labels
      batch["boxes_cxcywh"][row, : len(labels)] = inputs[f"boxes_{b}_{row}"]
      batch["is_target"][row, : len(labels)] = True
      if with_masks:
        masks = inputs[f"masks_{b}_{row}"]
        batch["masks"][row, : len(masks), : masks.shape[1], : masks.shape[2]] = masks
    batches.append(batch)
  return batches


def train(name, dtype=jnp.float32, computed_in=None):
  """Returns the fixture's outputs, metrics of every step, parameters before and after.

  `dtype` is that of the variables, and of the computation unless it is `computed_in` another.
  """
  folder = golden_folder(name)
  config = json.loads((folder / "config.json").read_text())
  inputs, outputs = dict(np.load(folder / "inputs.npz")), dict(np.load(folder / "outputs.npz"))
  start = golden_folder(config["start_config"].split("/")[0])
  model_config = json.loads((start / "config.json").read_text())
  tensors = load_file(start / "weights.safetensors")
  variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables_of(tensors, model_config))
  task = create_task(
    "detection",
    model_of(model_config, dtype=computed_in or dtype),
    num_classes=model_config["num_classes"],
    image_mean=0.0,
    image_std=1 / 255,  # the fixture's images are already normalised
  )
  fields = config["optimizer"]
  rules = [
    *FREEZE[name],
    ("backbone/.*", {"learning_rate": 0.1}),
    (".*", {"weight_decay": 1.0}),
  ]
  optimizer = create_optimizer(
    {
      "name": "adamw",
      "learning_rate": fields["lr"],
      "schedule": {"name": "constant"},
      "weight_decay": fields["weight_decay"],
      "clip_norm": config["clip"]["global_norm"],
      "rules": rules,
    },
    variables["params"],
    config["steps"],
  )
  state = create_state(task, [optimizer], variables, jax.random.key(0), with_ema=False)
  step = jax.jit(make_train_step(task, optimizer))
  batches = read_batches(inputs, 3, model_config["masks"])
  history = []
  for index in range(config["steps"]):
    state, metrics = step(state, batches[index % 3])
    history.append({k: float(v.compute()) for k, v in metrics.items()})
  return outputs, history, tensors, state.params, model_config


def assert_terms(history, outputs, rtol, atol=0.0):
  for ours, theirs in TERMS.items():
    for suffix in ("", "_0", "_1"):
      if f"term/{theirs}{suffix}" in outputs:
        got = np.array([metrics[ours + suffix] for metrics in history])
        np.testing.assert_allclose(got, outputs[f"term/{theirs}{suffix}"], rtol=rtol, atol=atol)


def assert_updates(params, tensors, outputs, model_config, tolerance):
  """Compares parameter updates; the error is relative to the update's norm."""
  names = [key.removeprefix("param/") for key in outputs if key.startswith("param/")]
  plain = {key.removeprefix("detr."): value for key, value in tensors.items()}
  finals = variables_of(plain | {n: outputs[f"param/{n}"] for n in names}, model_config)
  starts = variables_of(plain, model_config)
  got = traverse_util.flatten_dict(params, sep="/")
  final = traverse_util.flatten_dict(finals["params"], sep="/")
  start = traverse_util.flatten_dict(starts["params"], sep="/")
  compared = 0
  for path in final:
    # The fixture may hold one of the stacked layers: compare only where the reference moved.
    moved = final[path] != start[path]
    if not moved.any() or path.endswith("key/bias"):
      continue
    update = (final[path] - start[path])[moved]
    error = (np.asarray(got[path]) - final[path])[moved]
    assert np.linalg.norm(error) <= tolerance * np.linalg.norm(update), path
    compared += 1
  assert compared >= len(names)


@pytest.mark.long
def test_training_curve_of_detection_equals_official_code():
  outputs, history, tensors, params, model_config = train("train_detr_a")
  losses = np.array([metrics["loss"] for metrics in history])
  np.testing.assert_allclose(losses[:5], outputs["loss"][:5], rtol=2e-5)
  np.testing.assert_allclose(losses, outputs["loss"], rtol=5e-4)
  norms = np.array([metrics["gradient_norm"] for metrics in history])
  np.testing.assert_allclose(norms, outputs["grad_norm"], rtol=3e-2)
  assert_terms(history, outputs, rtol=5e-4)
  errors = [100 * metrics["class_error"] for metrics in history]
  np.testing.assert_allclose(errors, outputs["term/class_error"], rtol=1e-5)
  assert_updates(params, tensors, outputs, model_config, tolerance=5e-3)
  moved = params["backbone"]["stem"]["conv1"]["conv"]["kernel"]
  expected = np.transpose(tensors["backbone.0.body.conv1.weight"], (2, 3, 1, 0))
  np.testing.assert_array_equal(moved, expected)


@pytest.mark.long
def test_training_curve_in_bfloat16_follows_float32():
  outputs, history, *_ = train("train_detr_a", computed_in=jnp.bfloat16)
  losses = np.array([metrics["loss"] for metrics in history])
  np.testing.assert_allclose(losses, outputs["loss"], rtol=0.08)
  epochs, expected = (x[:18].reshape(6, 3).mean(axis=1) for x in (losses, outputs["loss"]))
  np.testing.assert_allclose(epochs, expected, rtol=0.04)
  assert epochs[-1] < 0.7 * epochs[0]


IN_FLOAT64 = """
import json, jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64  # before all other imports: what they compute in float32, too
from tests.systems.detr.test_training_curve import train
history = train("train_detr_a", jnp.float64)[1]
print(json.dumps([[metrics[name] for metrics in history] for name in ("loss", "gradient_norm")]))
"""


@pytest.mark.slow
def test_training_curve_in_float64_equals_official_code():
  """Float64 excludes accumulated rounding, and ties that rounding decides."""
  done = subprocess.run(
    [sys.executable, "-c", IN_FLOAT64],
    cwd=command.ROOT,
    env=command.environment(),
    capture_output=True,
    text=True,
    check=True,
  )
  losses, norms = json.loads(done.stdout.splitlines()[-1])
  outputs = np.load(golden_folder("train_detr_a") / "outputs.npz")
  np.testing.assert_allclose(losses, outputs["float64/loss"], rtol=1e-6)
  np.testing.assert_allclose(norms, outputs["float64/grad_norm"], rtol=2e-6)


@pytest.mark.long
def test_training_curve_of_mask_head_equals_official_code():
  outputs, history, tensors, params, model_config = train("train_detr_panoptic_a")
  masks = np.array([metrics["mask_loss"] + metrics["dice_loss"] for metrics in history])
  np.testing.assert_allclose(masks, outputs["loss_mask_plus_dice"], rtol=0, atol=5e-5)
  assert_terms(history, outputs, rtol=1e-4, atol=5e-5)
  assert_updates(params, tensors, outputs, model_config, tolerance=1e-2)
