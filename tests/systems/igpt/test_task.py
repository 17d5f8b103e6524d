"""Pixel modelling: losses and training curve of the references, micro-batches, completions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from vit_jax_zoo.systems.igpt import palette
from vit_jax_zoo.systems.igpt import task as igpt_task
from vit_jax_zoo.systems.igpt import weights_hf as igpt_hf
from vit_jax_zoo.systems.igpt.model import ImageGPT
from vit_jax_zoo.systems.igpt.task import PixelEvaluator, fit_bigrams, pixel_nats, score_bigrams
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import LossContext
from vit_jax_zoo.weights import key_map as table

TINY = {"num_colors": 8, "num_positions": 16, "width": 16, "depth": 1, "num_heads": 2}


def make_task(model_fields=None, **fields):
  return create_task("pixel_modelling", ImageGPT(**TINY, **(model_fields or {})), **fields)


def make_batch(rows=6, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (rows, 4, 4, 3), dtype=np.uint8),
    "label": rng.integers(0, 3, rows).astype(np.int32),
  }


def make_variables(task, batch):
  """Returns random nonzero parameters."""
  abstract = jax.eval_shape(task.init, jax.random.key(0), batch)
  rng = np.random.default_rng(0)
  return {
    "params": jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), abstract["params"]
    ),
    **jax.tree.map(jnp.asarray, task.init_from_data([batch])),
  }


def loss_context(task, batch, seed=1):
  return LossContext(
    rng=jax.random.key(seed), step=jnp.int32(0), normalizers=task.normalizers(batch)
  )


class Echo:
  """A model with fixed outputs, to test the loss alone."""

  num_colors, num_positions, num_classes = 32, 36, 10

  def __init__(self, inputs, causal):
    self.causal = causal
    self.inputs = inputs

  def init(self, rng, images):
    return {"params": {}}

  def complete(self, *args, **kwargs):
    raise NotImplementedError

  def apply(self, variables, images, *, visible=None, train=False):
    outputs = {"pixel_logits": "logits", "tokens": "tokens", "logits": "class_logits"}
    return {ours: jnp.asarray(self.inputs[theirs]) for ours, theirs in outputs.items()}


def test_losses_equal_openai(load_golden):
  _, inputs, outputs = load_golden("igpt_losses_a")
  logits, tokens = jnp.asarray(inputs["logits"]), jnp.asarray(inputs["tokens"])
  ours = pixel_nats(logits, tokens, None)
  np.testing.assert_allclose(ours, outputs["per_token_nll"].mean(axis=1), rtol=1e-6)
  masked = pixel_nats(logits, tokens, jnp.asarray(inputs["keep_mask"] > 0))
  np.testing.assert_allclose(masked.mean(), outputs["bert_loss"], rtol=1e-6)
  task = create_task("pixel_modelling", Echo(inputs, causal=True), class_weight=1.0)
  batch = {"image": np.zeros((3, 6, 6, 3), np.uint8), "label": inputs["labels"]}
  variables = task.init(jax.random.key(0), batch)
  output = task.loss(variables, batch, loss_context(task, batch))
  np.testing.assert_allclose(output.loss, outputs["joint_ar"], rtol=1e-6)
  metrics = {name: float(metric.compute()) for name, metric in output.metrics.items()}
  assert metrics["nats"] == pytest.approx(outputs["ar_loss"].item(), rel=1e-6)
  assert metrics["class_loss"] == pytest.approx(outputs["clf_loss"].item(), rel=1e-6)
  evaluator = task.evaluator()
  evaluator.add(batch, task.predict(variables, batch))
  scores = evaluator.result()
  assert scores["bits"] == pytest.approx(outputs["ar_bits_per_token"].item(), rel=1e-6)
  assert scores["log_likelihood"] == -scores["nats"]


@pytest.mark.parametrize("name", ["igpt_tf_a", "igpt_tf_bert_a"])
def test_losses_equal_openai_graph(load_golden, name):
  _, inputs, outputs = load_golden(name)
  visible = jnp.asarray(inputs["keep_mask"] > 0) if "keep_mask" in inputs else None
  logits, tokens = jnp.asarray(outputs["gen_logits"]), jnp.asarray(inputs["tokens"])
  loss = jnp.mean(pixel_nats(logits, tokens, visible))
  np.testing.assert_allclose(loss, outputs["gen_loss"], rtol=2e-6)


def test_masked_loss_of_fully_visible_image_is_zero():
  nats = pixel_nats(
    jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), int), jnp.array([[True] * 3, [False] * 3])
  )
  np.testing.assert_allclose(nats, [0, np.log(4)], rtol=1e-6)


@pytest.fixture(scope="module")
def curve():
  folder = golden_folder("train_imagegpt_a")
  return dict(np.load(folder / "inputs.npz")), dict(np.load(folder / "outputs.npz"))


def test_training_curve_equals_hugging_face(curve):
  inputs, outputs = curve
  model = ImageGPT(64, 64, 64, 3, 4, use_bias=True)
  published = igpt_hf.split(load_file(golden_folder("imagegpt_a") / "weights.safetensors"))
  init = functools.partial(model.init, method="from_tokens")
  abstract = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64), jnp.int32))["params"]
  shapes = {k: v.shape for k, v in traverse_util.flatten_dict(abstract, sep="/").items()}
  read = table.read(published, igpt_hf.TABLE, table.unroll_shapes(shapes), source="golden")
  params = traverse_util.unflatten_dict(table.stack(read, shapes), sep="/")
  optimizer = optax.adam(1e-3, b2=0.95)

  @jax.jit
  def step(params, state, tokens):
    def loss(params):
      logits = model.apply({"params": params}, tokens, method="from_tokens")["pixel_logits"]
      return jnp.mean(pixel_nats(logits, tokens, None))

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value, optax.tree.norm(grads)

  start, state = params, optimizer.init(params)
  for i in range(20):
    tokens = jnp.asarray(inputs["tokens"][i % 3])
    params, state, value, norm = step(params, state, tokens)
    np.testing.assert_allclose(value, outputs["loss"][i], rtol=1e-5)
    np.testing.assert_allclose(norm, outputs["grad_norm"][i], rtol=1e-4)

  def publish(params):
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    return igpt_hf.join(table.write(table.unroll(flat), igpt_hf.TABLE))

  before, after = publish(start), publish(params)
  compared = [key.removeprefix("param/") for key in outputs if key.startswith("param/")]
  assert len(compared) == 5
  for key in compared:
    expected = outputs[f"param/{key}"]
    error = np.linalg.norm(after[key] - expected) / np.linalg.norm(expected - before[key])
    assert error < 1e-3, key


@pytest.mark.parametrize("causal", [True, False])
def test_micro_batch_losses_sum_to_batch_loss(causal):
  task = make_task({"causal": causal, "num_classes": 3}, class_weight=1.0)
  batch = make_batch() | {"mask": np.array([True] * 5 + [False])}
  variables = make_variables(task, batch)
  context = loss_context(task, batch)
  step = jax.jit(
    jax.value_and_grad(lambda p, b: task.loss({**variables, "params": p}, b, context).loss)
  )
  pieces = [{k: v[i : i + 3] for k, v in batch.items()} for i in (0, 3)]
  losses, grads = zip(*(step(variables["params"], piece) for piece in pieces), strict=True)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  if causal:  # other masks are drawn for each micro-batch
    whole, gradient = step(variables["params"], batch)
    np.testing.assert_allclose(sum(losses), whole, rtol=1e-6)
    summed = jax.tree.map(jnp.add, *grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), summed, gradient)


def test_masks_have_given_probability_and_depend_on_rng():
  task = make_task({"causal": False}, mask_probability=0.3)
  batch = make_batch(rows=64)
  variables = make_variables(task, batch)
  masks = []
  forward = jax.jit(lambda v, x, visible: task.model.apply(v, x, visible=visible))

  class MaskRecorder:
    num_colors, num_positions, num_classes, causal = 8, 16, None, False

    def apply(self, variables, images, *, visible, train):
      masks.append(np.asarray(visible))
      return forward(variables, images, visible)

    init = complete = apply

  recorded = create_task("pixel_modelling", MaskRecorder(), mask_probability=0.3)
  losses = [recorded.loss(variables, batch, loss_context(task, batch, s)).loss for s in (1, 1, 2)]
  assert losses[0] == losses[1] != losses[2]
  assert np.mean(~masks[0]) == pytest.approx(0.3, abs=0.05)
  recorded.predict(variables, batch)
  recorded.predict(variables, batch)
  np.testing.assert_array_equal(masks[-1], masks[-2])


def test_masked_model_labels_are_majority_vote():
  task = make_task({"causal": False, "num_classes": 3}, class_weight=1.0, mask_probability=0.5)
  assert task.feature_views == 5
  batch = make_batch(rows=64)
  variables = make_variables(task, batch)
  predict = lambda **f: jax.jit(dataclasses.replace(task, **f).predict)(variables, batch)  # noqa: E731
  predictions = predict()
  features = jax.jit(task.features)
  views = [
    features(variables, batch | {"view": np.full(64, v, np.int32)})["layers"] for v in range(5)
  ]
  np.testing.assert_array_equal(views[0], features(variables, batch)["layers"])
  assert (views[0] != views[1]).any()
  logits = np.stack([view[:, -1] @ variables["params"]["head"]["kernel"] for view in views])
  votes = logits.argmax(-1)
  assert (votes != votes[0]).any()  # otherwise the test has no effect
  counts = np.stack([(votes == k).sum(0) for k in range(3)], axis=1)
  labels = np.asarray(predictions["labels"])
  assert (counts[np.arange(64), labels] == counts.max(1)).all()
  np.testing.assert_array_equal(predictions["correct"], labels == batch["label"])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, np.stack([batch["label"]] * 5))
  np.testing.assert_allclose(predictions["class_loss"], losses.mean(0), rtol=1e-4)
  once = predict(maskings=1)
  np.testing.assert_array_equal(once["labels"], votes[0])
  assert (once["nats"] != predictions["nats"]).any()
  assert make_task({"num_classes": 3}).feature_views == 1  # a causal model has no random masks


def test_init_from_data_fits_or_reads_palette_and_fits_bigrams(tmp_path):
  task = make_task()
  batch = make_batch(rows=40)
  fitted = task.init_from_data(iter([batch]))
  clusters = fitted["palette"]["clusters"]
  assert clusters.shape == (8, 3)
  np.testing.assert_array_equal(clusters, palette.fit_palette(batch["image"], 8))
  np.save(str(tmp_path / "colors.npy"), clusters[::-1])
  read = make_task(palette=str(tmp_path / "colors.npy")).init_from_data([batch])
  np.testing.assert_array_equal(read["palette"]["clusters"], clusters[::-1])
  init = jax.eval_shape(task.init, jax.random.key(0), batch)
  for name, tree in fitted.items():
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), init[name])
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) == shapes
  untrained = jax.jit(task.init)(jax.random.key(0), batch)
  variables = {**untrained, **jax.tree.map(jnp.asarray, fitted)}
  predictions = jax.jit(task.predict)(variables, batch)
  np.testing.assert_allclose(predictions["nats"], np.log(8), rtol=1e-5)
  assert predictions["bigram_nats"].mean() < np.log(8)


def test_init_from_data_reads_only_palette_images():
  task = make_task(palette_images=50)
  batches_read = []

  def batches():
    for seed in range(100):
      batches_read.append(seed)
      yield make_batch(rows=20, seed=seed)

  task.init_from_data(batches())
  assert batches_read == [0, 1, 2]


def test_completions_keep_prefix_and_scores_ignore_padding():
  task = make_task({"num_classes": 3}, completions=2, class_weight=1.0)
  batch = make_batch() | {"prefix_length": np.array([0, 4, 8, 8, 12, 16], np.int32)}
  variables = make_variables(task, batch)
  predictions = {k: np.asarray(v) for k, v in jax.jit(task.predict)(variables, batch).items()}
  assert predictions["completions"].shape == (6, 2, 4, 4, 3)
  clusters = np.asarray(variables["palette"]["clusters"])
  nearest = palette.encode(batch["image"], clusters)
  quantized = np.asarray(palette.cluster_colors(jnp.asarray(nearest), jnp.asarray(clusters)))
  np.testing.assert_array_equal(predictions["quantized"], quantized)
  pixels = predictions["completions"].reshape(6, 2, 16, 3)
  for row, length in enumerate(batch["prefix_length"]):
    expected = quantized[row].reshape(16, 3)[:length]
    np.testing.assert_array_equal(pixels[row, :, :length], np.stack([expected, expected]))
  assert (pixels[0, 0] != pixels[0, 1]).any()
  padded = batch | {"mask": np.array([True] * 4 + [False] * 2)}
  first, second, whole = task.evaluator(), task.evaluator(), task.evaluator()
  pieces = [slice(0, 3), slice(3, 6)]
  for evaluator, piece in zip((first, second), pieces, strict=True):
    evaluator.add(
      {k: v[piece] for k, v in padded.items()}, {k: v[piece] for k, v in predictions.items()}
    )
  first.merge(second)
  whole.add(padded, predictions)
  assert first.result() == pytest.approx(whole.result())
  assert whole.result()["images"] == 4
  assert whole.result()["nats"] == pytest.approx(predictions["nats"][:4].mean(), rel=1e-6)
  assert whole.result()["accuracy"] == predictions["correct"][:4].mean()
  figures = task.figures(padded, predictions)
  assert figures["completions"].texts[1].get_text() == "images: 4; draws of each: 2"
  assert task.figures(batch, {"nats": predictions["nats"]}) == {}
  assert len(task.batch_figures(batch)["batch"].axes) == 6


def test_loss_of_invalid_label_is_nan_unless_padding():
  task = make_task({"num_classes": 3}, class_weight=1.0)
  batch = make_batch()
  variables = make_variables(task, batch)
  wrong = batch | {"label": np.array([0, 1, 2, 3, 0, 1], np.int32)}
  wrong |= {"mask": np.ones(6, bool)}

  @jax.jit
  def loss_and_gradient(batch):
    context = loss_context(task, batch)
    return jax.value_and_grad(lambda p: task.loss({**variables, "params": p}, batch, context).loss)(
      variables["params"]
    )

  assert np.isnan(loss_and_gradient(wrong)[0])
  padded = wrong | {"mask": np.arange(6) != 3}
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loss_and_gradient(padded)))


def test_best_metric_depends_on_class_weight():
  assert make_task().best_metric == "log_likelihood"
  assert make_task({"num_classes": 3}, class_weight=0.5).best_metric == "accuracy"
  with pytest.raises(ValueError, match="no image was evaluated"):
    PixelEvaluator().result()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mask_probability": 0.0}, "mask_probability: 0.0"),
    ({"temperature": -1.0}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"maskings": 0}, "maskings"),
    ({"class_weight": 1.0}, "num_classes"),
  ],
)
def test_invalid_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    make_task(**fields)
  assert "\n" not in str(error.value)


def test_palette_of_wrong_size_raises(tmp_path):
  np.save(str(tmp_path / "colors.npy"), np.zeros((5, 3), np.float32))
  task = make_task(palette=str(tmp_path / "colors.npy"))
  with pytest.raises(ValueError, match="num_colors=5"):
    task.init_from_data([make_batch()])
  with pytest.raises(ValueError, match=r"data\.train"):
    make_task().init_from_data([])


def test_bigram_probabilities_and_scores():
  tokens = np.array([[0, 1, 1, 2], [0, 1, 2, 2]])
  table = fit_bigrams(tokens, 3)
  counts = np.array([[0, 2, 0], [0, 1, 2], [0, 0, 1], [2, 0, 0]])
  smoothed = counts + (np.array([2, 3, 3]) + 1) / 11
  expected = smoothed / smoothed.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(np.exp(table), expected, rtol=1e-6)
  expected = -(table[3, 0] + table[0, 1] + table[1, 1] + table[1, 2]) / 4
  scores = score_bigrams(jnp.asarray(tokens), jnp.asarray(table))
  np.testing.assert_allclose(scores[0], expected, rtol=1e-6)


def test_completions_figure_has_prefix_completions_and_original(monkeypatch):
  monkeypatch.setattr(igpt_task, "MAX_COMPLETED", 2)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
  completions = rng.integers(0, 256, (3, 2, 4, 4, 3), dtype=np.uint8)
  prefix_lengths = np.array([8, 0, 6])
  figure = igpt_task.draw_completions(images, prefix_lengths, completions)
  (ax,) = figure.axes
  # A pixel is drawn as 6 x 6; pictures are separated by one column or row.
  drawn = np.pad(np.asarray(ax.images[0].get_array()), ((0, 1), (0, 1), (0, 0)))
  # Of 255; the figure has float32 in [0, 1].
  tiles = 255 * drawn.reshape(2, 25, 4, 25, 3).swapaxes(1, 2)[:, :, 3:24:6, 3:24:6]
  np.testing.assert_allclose(tiles[:, 1:3], completions[:2], atol=1e-3)
  np.testing.assert_allclose(tiles[:, 3], images[:2], atol=1e-3)
  np.testing.assert_allclose(tiles[0, 0, :2], images[0, :2], atol=1e-3)
  np.testing.assert_allclose(tiles[0, 0, 2:], np.full((2, 4, 3), igpt_task.MISSING), atol=1e-3)
  labels = [text.get_text() for text in ax.get_xticklabels()]
  assert labels == ["given", "draw 1", "draw 2", "original"]
  assert "images: 2; draws of each: 2" in [text.get_text() for text in figure.texts]
  one = igpt_task.draw_completions(images[:1], prefix_lengths[:1], completions[:1, :1])
  assert "images: 1; draws of each: 1" in [text.get_text() for text in one.texts]


def test_keep_pixels_ends_within_row():
  image = np.full((2, 3, 3), 7, np.uint8)
  prefix = igpt_task.keep_pixels(image, 4)
  np.testing.assert_array_equal((prefix == 7).all(-1), [[True] * 3, [True, False, False]])
  assert (image == 7).all()
