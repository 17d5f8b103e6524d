"""The classification task: reference losses, exact sums over micro-batches, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import LossContext


def make_context(task, batch, seed=1):
  return LossContext(
    rng=jax.random.key(seed), step=jnp.int32(0), normalizers=task.normalizers(batch)
  )


class ConstantLogits:
  """A model with given logits, to test the loss alone."""

  def __init__(self, logits):
    self.logits = jnp.asarray(logits)

  def init(self, rng, images, *, train=False):
    return {"params": {}}

  def apply(self, variables, images, *, train=False, rngs=None, mutable=False):
    rows = images.shape[0]
    outputs = {"logits": self.logits[:rows]}
    return (outputs, {}) if mutable is not False else outputs


def blank_images(rows):
  return np.zeros((rows, 2, 2, 3), np.uint8)


def numpy_batch(batch, predictions):
  return batch, {name: np.asarray(value) for name, value in predictions.items()}


def test_class_names_not_utf8_drawn():
  """Names from JSON or folders may not be encodable as UTF-8, which matplotlib requires."""
  names = ("caf\udce9", "\ud83d")
  task = create_task(
    "classification", ConstantLogits([[0.0, 1.0]]), num_classes=2, class_names=names
  )
  assert task.class_names == (r"caf\udce9", r"\ud83d")


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_losses_equal_reference(load_golden, objective):
  config, inputs, outputs = load_golden("vit_losses_a")
  task = create_task(
    "classification",
    ConstantLogits(inputs["logits"]),
    num_classes=config["classes"],
    objective=objective,
  )
  batch = {"image": blank_images(config["batch"]), "label": inputs["onehot"]}
  predictions = task.predict({}, batch)
  expected = outputs[f"{objective}_xent_per_example"]
  np.testing.assert_allclose(predictions["loss"], expected, rtol=2e-6)
  trained = task.loss({}, batch, make_context(task, batch))
  np.testing.assert_allclose(trained.loss, outputs[f"{objective}_xent_mean"], rtol=2e-6)
  mixed = batch | {"label": outputs["mixup_labels"]}
  trained = task.loss({}, mixed, make_context(task, mixed))
  np.testing.assert_allclose(trained.loss, outputs[f"{objective}_xent_mixup_mean"], rtol=2e-6)


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["onehot", "real"])
def test_scores_equal_reference(load_golden, objective, kind):
  config, inputs, outputs = load_golden("vit_losses_a")
  task = create_task(
    "classification",
    ConstantLogits(inputs["logits"]),
    num_classes=config["classes"],
    objective=objective,
  )
  labels = inputs["onehot"] if kind == "onehot" else inputs["real_labels"]
  batch = {
    "image": blank_images(config["batch"]),
    "label": labels,
    "mask": inputs["pad_mask"].astype(bool),
  }
  evaluator = task.evaluator()
  evaluator.add(*numpy_batch(batch, task.predict({}, batch)))
  scores = evaluator.result()
  assert scores["images"] == outputs[f"{kind}_nseen"].item()
  assert scores["accuracy"] == pytest.approx(outputs[f"{kind}_prec1"].item())
  expected = outputs[f"{kind}_{objective}_xent_sum"].item()
  assert scores["loss"] * scores["images"] == pytest.approx(expected, rel=2e-6)


def test_integer_labels_equal_one_hot(tiny_classifier, batch):
  task = create_task("classification", tiny_classifier(), num_classes=7)
  variables = task.init(jax.random.key(0), batch)
  one_hot = batch | {"label": np.eye(7, dtype=np.float32)[batch["label"]]}
  context = make_context(task, batch)
  left, right = task.loss(variables, batch, context), task.loss(variables, one_hot, context)
  np.testing.assert_array_equal(left.loss, right.loss)
  assert left.metrics["accuracy"].compute() == right.metrics["accuracy"].compute()


def test_softmax_label_smoothing():
  logits = np.array([[2.0, -1.0, 0.5, 0.0]], np.float32)
  task = create_task("classification", ConstantLogits(logits), num_classes=4, label_smoothing=0.1)
  batch = {"image": blank_images(1), "label": np.array([2], np.int32)}
  log_p = logits[0] - np.log(np.exp(logits[0]).sum())
  smoothed = np.full(4, 0.025) + np.array([0, 0, 0.9, 0])
  loss = task.loss({}, batch, make_context(task, batch)).loss
  np.testing.assert_allclose(loss, -(smoothed * log_p).sum(), rtol=1e-6)
  np.testing.assert_allclose(task.predict({}, batch)["loss"], [-log_p[2]], rtol=1e-6)


def test_sigmoid_loss_summed_over_classes():
  logits = np.zeros((1, 4), np.float32)
  task = create_task("classification", ConstantLogits(logits), num_classes=4, objective="sigmoid")
  batch = {"image": blank_images(1), "label": np.array([[1, 0, 1, 0]], np.float32)}
  predictions = task.predict({}, batch)
  np.testing.assert_allclose(predictions["loss"], [4 * np.log(2)], rtol=1e-6)
  np.testing.assert_allclose(predictions["probabilities"], np.full((1, 4), 0.5))


@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_sum_to_batch(tiny_classifier, batch, parts):
  batch = batch | {"mask": np.array([True] * 10 + [False] * 2)}
  task = create_task("classification", tiny_classifier(), num_classes=7, label_smoothing=0.1)
  variables = task.init(jax.random.key(0), batch)
  context = make_context(task, batch)
  step = jax.jit(jax.value_and_grad(lambda p, b: task.loss({"params": p}, b, context).loss))
  loss, gradient = step(variables["params"], batch)
  pieces = [{k: np.split(v, parts)[i] for k, v in batch.items()} for i in range(parts)]
  losses, gradients = zip(*(step(variables["params"], piece) for piece in pieces), strict=True)
  np.testing.assert_allclose(sum(losses), loss, rtol=1e-6)
  summed = jax.tree.map(lambda *leaves: sum(leaves), *gradients)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), summed, gradient)
  metrics_of = jax.jit(lambda b: task.loss(variables, b, context).metrics)
  metrics, whole = [metrics_of(piece) for piece in pieces], metrics_of(batch)
  for name, value in whole.items():
    merged = metrics[0][name]
    for other in metrics[1:]:
      merged = merged.merge(other[name])
    np.testing.assert_allclose(merged.compute(), value.compute(), rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 3])
def test_padding_has_no_effect(tiny_classifier, batch, label):
  task = create_task("classification", tiny_classifier(), num_classes=7)
  variables = task.init(jax.random.key(0), batch)
  padded = {
    "image": np.concatenate([batch["image"], np.full((4, 4, 4, 3), 200, np.uint8)]),
    "label": np.concatenate([batch["label"], np.full(4, label, np.int32)]),
    "mask": np.array([True] * 12 + [False] * 4),
  }

  @jax.jit
  @jax.value_and_grad
  def loss(params, examples):
    return task.loss({"params": params}, examples, make_context(task, examples)).loss

  left, right = loss(variables["params"], batch), loss(variables["params"], padded)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)
  scores = []
  for examples in (batch, padded):
    evaluator = task.evaluator()
    evaluator.add(*numpy_batch(examples, task.predict(variables, examples)))
    scores.append(evaluator.result())
  assert scores[0] == pytest.approx(scores[1], rel=1e-6)
  assert scores[0]["images"] == 12


def test_label_out_of_range_gives_nan_loss(tiny_classifier, batch):
  task = create_task("classification", tiny_classifier(), num_classes=7)
  variables = task.init(jax.random.key(0), batch)
  wrong = batch | {"label": np.where(np.arange(12) == 3, 7, batch["label"]).astype(np.int32)}
  assert np.isnan(task.loss(variables, wrong, make_context(task, wrong)).loss)
  assert np.isfinite(task.loss(variables, batch, make_context(task, batch)).loss)


def test_batch_stats_updated_other_state_kept(tiny_classifier, batch):
  task = create_task("classification", tiny_classifier(batch_norm=True), num_classes=7)
  variables = dict(task.init(jax.random.key(0), batch)) | {"constants": {"table": jnp.arange(3)}}
  output = jax.jit(task.loss)(variables, batch, make_context(task, batch))
  assert set(output.model_state) == {"batch_stats", "constants"}
  np.testing.assert_array_equal(output.model_state["constants"]["table"], [0, 1, 2])
  before, after = variables["batch_stats"], output.model_state["batch_stats"]
  assert not np.array_equal(before["BatchNorm_0"]["mean"], after["BatchNorm_0"]["mean"])
  later = variables | {"batch_stats": after}
  left, right = task.predict(variables, batch), task.predict(later, batch)
  assert not np.allclose(left["loss"], right["loss"])


def test_model_without_state(tiny_classifier, batch):
  task = create_task("classification", tiny_classifier(), num_classes=7)
  variables = task.init(jax.random.key(0), batch)
  assert task.loss(variables, batch, make_context(task, batch)).model_state == {}


def test_dropout_by_rng_not_in_prediction(tiny_classifier, batch):
  task = create_task("classification", tiny_classifier(dropout_rate=0.5), num_classes=7)
  variables = task.init(jax.random.key(0), batch)
  losses = [
    float(task.loss(variables, batch, make_context(task, batch, s)).loss) for s in (1, 1, 2)
  ]
  assert losses[0] == losses[1] != losses[2]
  left, right = task.predict(variables, batch), task.predict(variables, batch)
  np.testing.assert_array_equal(left["loss"], right["loss"])


def test_bfloat16_model_loss_in_float32(tiny_classifier, batch):
  task = create_task("classification", tiny_classifier(dtype="bfloat16"), num_classes=7)
  variables = task.init(jax.random.key(0), batch)
  output = task.loss(variables, batch, make_context(task, batch))
  assert output.loss.dtype == jnp.float32
  assert task.predict(variables, batch)["probabilities"].dtype == jnp.float32
  exact = create_task("classification", tiny_classifier(), num_classes=7)
  np.testing.assert_allclose(
    output.loss, exact.loss(variables, batch, make_context(exact, batch)).loss, rtol=2e-2
  )


def test_predictions_sorted_by_probability(tiny_classifier, batch):
  task = create_task("classification", tiny_classifier(), num_classes=7, top_k=3)
  variables = task.init(jax.random.key(0), batch)
  predictions = jax.jit(task.predict)(variables, batch)
  assert predictions["labels"].shape == predictions["probabilities"].shape == (12, 3)
  assert np.all(np.diff(predictions["probabilities"], axis=1) <= 0)
  np.testing.assert_array_equal(
    predictions["correct"], predictions["labels"] == batch["label"][:, None]
  )
  unlabelled = task.predict(variables, {"image": batch["image"]})
  assert set(unlabelled) == {"labels", "probabilities"}
  np.testing.assert_array_equal(unlabelled["labels"], predictions["labels"])


def test_float_images_equal_uint8(tiny_classifier, batch):
  task = create_task("classification", tiny_classifier(), num_classes=7)
  variables = task.init(jax.random.key(0), batch)
  floats = batch | {"image": batch["image"].astype(np.float32)}
  left, right = task.predict(variables, batch), task.predict(variables, floats)
  np.testing.assert_array_equal(left["loss"], right["loss"])


def test_figures_exclude_padding(tiny_classifier, batch):
  task = create_task("classification", tiny_classifier(), num_classes=7)
  variables = task.init(jax.random.key(0), batch)
  padded = batch | {"mask": np.array([True] * 9 + [False] * 3)}
  padded, predictions = numpy_batch(padded, task.predict(variables, padded))
  figures = task.figures(padded, predictions)
  assert isinstance(figures["predictions"], Figure)
  assert len(figures["predictions"].axes) == 9
  assert isinstance(task.batch_figures(batch)["batch"], Figure)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"num_clases": 3},
      "'num_clases'.*'num_classes'",
    ),
    ({}, "the field 'num_classes'"),
    ({"num_classes": None}, "num_classes"),
    ({"num_classes": 7, "objective": "sigmoids"}, "did you mean 'sigmoid'"),
    ({"num_classes": 7, "label_smoothing": 1.5}, "label_smoothing"),
    ({"num_classes": 7, "class_names": ["a"]}, "class_names: 1"),
    ({"num_classes": 0}, "num_classes: 0"),
  ],
)
def test_invalid_fields_raise(tiny_classifier, fields, message):
  with pytest.raises(ValueError, match=message) as error:
    create_task("classification", tiny_classifier(), **fields)
  assert "\n" not in str(error.value)


def test_unknown_task_suggests_nearest(tiny_classifier):
  with pytest.raises(ValueError, match="did you mean 'classification'"):
    create_task("clasification", tiny_classifier())


def test_num_classes_mismatch_raises(tiny_classifier, batch):
  task = create_task("classification", tiny_classifier(num_classes=5), num_classes=7)
  variables = task.init(jax.random.key(0), batch)
  with pytest.raises(ValueError, match="num_classes: 5"):
    task.predict(variables, batch)
  task = create_task("classification", tiny_classifier(), num_classes=7)
  soft = batch | {"label": np.zeros((12, 5), np.float32)}
  with pytest.raises(ValueError, match="num_classes=7"):
    task.loss(task.init(jax.random.key(0), soft), soft, make_context(task, soft))


def test_config_lists_become_tuples(tiny_classifier):
  task = create_task("classification", tiny_classifier(), num_classes=2, class_names=["cat", "dog"])
  assert task.class_names == ("cat", "dog")
  assert task.best_metric in {"accuracy"}
  with pytest.raises(dataclasses.FrozenInstanceError):
    task.num_classes = 3


def test_per_class_draws_confusion_matrix():
  names = ("a", "b", "c")
  task = create_task(
    "classification", ConstantLogits(np.eye(3)), num_classes=3, class_names=names, top_k=1
  )
  batch = {"label": np.array([0, 0, 2])}
  ranked = np.array([[0], [1], [2]])
  correct = ranked == batch["label"][:, None]
  predictions = {"labels": ranked, "correct": correct, "loss": np.zeros(3)}
  evaluator = task.evaluator()
  evaluator.add(batch, predictions)
  assert task.score_figures(evaluator) == {}
  scored = dataclasses.replace(task, per_class=True)
  evaluator = scored.evaluator()
  evaluator.add(batch, predictions)
  figure = scored.score_figures(evaluator)["confusion"]
  assert figure.axes[0].get_title(loc="left").endswith("2 of 3 correct")


def test_features_before_head(batch):
  class Headless(ConstantLogits):
    def apply(self, variables, images, **options):
      return {"features": jnp.mean(images, axis=(1, 2)).astype(jnp.bfloat16)}

  rows = len(batch["image"])
  task = create_task("classification", Headless(np.zeros((rows, 3))), num_classes=3)
  found = task.features({}, batch)["features"]
  assert found.dtype == jnp.float32
  expected = (np.asarray(batch["image"], np.float32) / 127.5 - 1).mean((1, 2))
  np.testing.assert_allclose(found, expected, atol=1e-2)
  task = create_task("classification", ConstantLogits(np.zeros((rows, 3))), num_classes=3)
  with pytest.raises(ValueError, match="ConstantLogits"):
    task.features({}, batch)
