"""Image GPT: against OpenAI's and Hugging Face's code; causality; the paper's sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from vit_jax_zoo.nn import transformer
from vit_jax_zoo.planning import hlo
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.systems.igpt import model as igpt
from vit_jax_zoo.systems.igpt import weights_hf as igpt_hf
from vit_jax_zoo.systems.igpt import weights_openai as igpt_tf
from vit_jax_zoo.weights import key_map as table

TINY = {"num_colors": 16, "num_positions": 16, "width": 16, "depth": 2, "num_heads": 2}


def load_params(published, rows, fields, ignore=()):
  model = igpt.ImageGPT(**fields)
  tokens = jnp.zeros((1, fields["num_positions"]), jnp.int32)
  init = functools.partial(model.init, method="from_tokens")
  abstract = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
  shapes = {k: v.shape for k, v in traverse_util.flatten_dict(abstract, sep="/").items()}
  layers = table.read(published, rows, table.unroll_shapes(shapes), source="golden", ignore=ignore)
  params = table.stack(layers, shapes)
  return model, {"params": traverse_util.unflatten_dict(params, sep="/")}


def load_tf(name):
  published = load_file(golden_folder(name) / "weights.safetensors")
  return load_params(published, igpt_tf.TABLE, igpt_tf.infer_fields(published))


def load_hf(config, with_score=False, **fields):
  published = load_file(golden_folder("imagegpt_a") / "weights.safetensors")
  if with_score:
    published |= load_file(golden_folder("imagegpt_a") / "weights_score.safetensors")
  published = igpt_hf.split(published)
  fields = igpt_hf.infer_fields(published, config) | fields
  if not fields.get("sos_token", True):
    published.pop("transformer.wte.sos")
  return load_params(published, igpt_hf.TABLE, fields)


@functools.cache
def init_tiny(**fields):
  """Returns a small model with random nonzero parameters, without compiling."""
  model = igpt.ImageGPT(**{**TINY, **fields})
  abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
  rng = np.random.default_rng(0)
  flat = {
    key: jnp.asarray(rng.normal("scale" in key, 0.2, leaf.shape), jnp.float32)
    for key, leaf in traverse_util.flatten_dict(abstract, sep="/").items()
  }
  return model, traverse_util.unflatten_dict(flat, sep="/")


def make_sampler(model, **options):
  return functools.partial(igpt.complete, model, **options)


def random_tokens(rows=2, seed=1, length=16):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 16, (rows, length)), jnp.int32)


def flat_numpy(tree):
  return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def assert_close(ours, theirs, atol):
  np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["igpt_tf_a", "igpt_tf_bert_a"])
def test_block_outputs_equal_openai(load_golden, name):
  _, inputs, outputs = load_golden(name)
  tokens = jnp.asarray(inputs["tokens"])
  model, variables = load_tf(name)
  visible = jnp.asarray(inputs["keep_mask"] > 0) if "keep_mask" in inputs else None
  ours, state = model.apply(
    variables,
    tokens,
    visible=visible,
    method="from_tokens",
    mutable=["intermediates"],
  )
  state = state["intermediates"]
  assert_close(state["embedded"][0], outputs["embed"], 1e-6)
  for i, block in enumerate(state["decoder"]["blocks"]["output"][0]):
    assert_close(block, outputs[f"block_{i}"], 1e-5)
    assert_close(ours["layer_features"][:, i], outputs[f"probe_{i}"], 1e-5)
  assert_close(state["encoded"][0], outputs["ln_f"], 1e-5)
  assert_close(ours["features"], outputs["pooled_ln_f"], 1e-5)
  assert_close(ours["layer_features"][:, -1], outputs["pooled_ln_f"], 1e-5)
  assert_close(ours["pixel_logits"], outputs["gen_logits"], 1e-4)
  assert_close(ours["logits"], outputs["clf_logits"], 1e-4)
  compiled = jax.jit(functools.partial(model.apply, method="from_tokens"))
  quick = compiled(variables, tokens, visible=visible)
  assert_close(quick["pixel_logits"], outputs["gen_logits"], 1e-4)


def test_layer_outputs_equal_hugging_face(load_golden):
  config, inputs, outputs = load_golden("imagegpt_a")
  model, variables = load_hf(config)
  assert model.use_bias
  ours, state = model.apply(
    variables, jnp.asarray(inputs["tokens"]), method="from_tokens", mutable=["intermediates"]
  )
  state = state["intermediates"]
  assert_close(state["embedded"][0], outputs["hidden_0"], 1e-6)
  blocks = state["decoder"]["blocks"]
  for i in (1, 2):
    assert_close(blocks["output"][0][i - 1], outputs[f"hidden_{i}"], 1e-5)
  assert_close(blocks["attention"]["weights"][0][0], outputs["attn_weights_0"], 1e-5)
  assert_close(state["encoded"][0], outputs["hidden_3"], 1e-5)
  assert_close(ours["pixel_logits"], outputs["logits"], 1e-4)


@pytest.mark.parametrize("sos_token", [True, False])
def test_classifier_equals_hugging_face(load_golden, sos_token):
  config, inputs, outputs = load_golden("imagegpt_a")
  model, variables = load_hf(config, with_score=True, sos_token=sos_token)
  ours = model.apply(variables, jnp.asarray(inputs["tokens"]), method="from_tokens")
  key = "clf_logits_with_sos" if sos_token else "clf_logits_hf_no_sos"
  assert_close(ours["logits"], outputs[key], 1e-4)
  assert_close(ours["pixel_logits"], outputs["logits" if sos_token else "logits_no_sos"], 1e-4)


def test_hugging_face_round_trip_is_exact(load_golden):
  config, _, _ = load_golden("imagegpt_a")
  published = load_file(golden_folder("imagegpt_a") / "weights.safetensors")
  _, variables = load_hf(config)
  flat = table.unroll(flat_numpy(variables["params"]))
  written = igpt_hf.join(table.write(flat, igpt_hf.TABLE))
  assert written.keys() == published.keys()
  for key, array in published.items():
    np.testing.assert_array_equal(written[key], array)


def test_round_trip_of_zero_biases_is_exact(load_golden):
  published = load_file(golden_folder("imagegpt_a") / "weights.safetensors")
  published = {k: v * 0 if k.endswith("bias") else v for k, v in published.items()}
  flat = igpt_hf.split(published)
  assert not igpt_hf.infer_fields(flat, {"n_head": 2})["use_bias"]
  flat = {key: array for key, array in flat.items() if ".bias" not in key}
  joined = igpt_hf.join(flat)
  assert joined.keys() == published.keys()
  for key, array in published.items():
    np.testing.assert_array_equal(joined[key], array)


@pytest.mark.parametrize("kind", ["half", "unconditional"])
def test_greedy_completions_equal_hugging_face(load_golden, kind):
  config, inputs, outputs = load_golden("imagegpt_a")
  model, variables = load_hf(config)
  prefix_length = config["half"] if kind == "half" else 0
  key = "greedy_half_completion" if kind == "half" else "greedy_unconditional"
  expected = outputs[key][:, 1:]
  prefix = jnp.where(jnp.arange(64) < prefix_length, expected, 0)
  if kind == "half":
    np.testing.assert_array_equal(inputs["prefix"][:, 1:], prefix[:, :prefix_length])
  complete = jax.jit(make_sampler(model, temperature=0.0))
  lengths = jnp.full(2, prefix_length)
  np.testing.assert_array_equal(complete(variables, prefix, lengths, jax.random.key(0)), expected)


@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("igpt_s", 76_571_648),
    ("igpt_m", 455_157_760),
    ("igpt_l", 1_362_250_752),
    ("igpt_xl", 6_801_438_720),
  ],
)
def test_parameter_counts_equal_paper(name, count):
  model = create_model(name)
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
  masked = create_model(name, causal=False)
  variables = jax.eval_shape(masked.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  leaves = jax.tree.leaves(variables["params"])
  assert sum(leaf.size for leaf in leaves) == count - model.width


def test_parameter_count_with_bias_equals_hugging_face():
  model = create_model("igpt_s", use_bias=True)
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 76_682_240


def test_initialisation_equals_paper():
  model = igpt.ImageGPT(num_positions=64, width=128, depth=2, num_heads=2)
  init = jax.jit(functools.partial(model.init, method="from_tokens"))
  params = init(jax.random.key(0), jnp.zeros((1, 64), jnp.int32))["params"]
  block = params["decoder"]["blocks"]
  for array, std in (
    (params["token_embedding"], 0.02),
    (params["sos_token"], 0.02),
    (params["position_embedding"], 0.01),
    (block["attention"]["query"]["kernel"], 128**-0.5),
    (block["attention"]["value"]["kernel"], 128**-0.5),
    (block["attention"]["out"]["kernel"], (128 * 2) ** -0.5),
    (block["mlp"]["hidden"]["kernel"], 0.02),
    (block["mlp"]["out"]["kernel"], 0.02),
  ):
    assert np.std(array) == pytest.approx(std, rel=0.2)
  assert not params["pixel_head"].any()
  np.testing.assert_array_equal(block["mlp_norm"]["scale"], np.ones((2, 128)))


def test_logits_depend_only_on_previous_pixels():
  model, variables = init_tiny()
  forward = jax.jit(lambda t: model.apply(variables, t, method="from_tokens")["pixel_logits"])
  tokens = random_tokens()
  before = forward(tokens)
  for position in (0, 7, 15):
    after = forward(tokens.at[:, position].set((tokens[:, position] + 5) % 16))
    np.testing.assert_array_equal(before[:, : position + 1], after[:, : position + 1])
    if position < 15:
      assert np.all(np.any(before[:, position + 1 :] != after[:, position + 1 :], axis=-1))


def test_masked_logits_depend_only_on_visible_pixels():
  model, variables = init_tiny(causal=False)
  visible = np.arange(16) % 3 != 0
  forward = jax.jit(
    lambda t: model.apply(
      variables, t, visible=jnp.broadcast_to(visible, t.shape), method="from_tokens"
    )["pixel_logits"]
  )
  tokens = random_tokens()
  hidden_changed = jnp.where(visible, tokens, (tokens + 3) % 16)
  np.testing.assert_array_equal(forward(tokens), forward(hidden_changed))
  seen_changed = jnp.where(jnp.arange(16) == 4, (tokens + 3) % 16, tokens)
  assert np.all(np.any(forward(tokens) != forward(seen_changed), axis=-1))


def test_gradients_are_equal_scanned_unrolled_and_with_remat():
  model, variables = init_tiny()
  flat = table.unroll(flat_numpy(variables["params"]))
  unrolled = {"params": traverse_util.unflatten_dict(flat, sep="/")}
  tokens = random_tokens()

  def gradient(model, params):
    def loss(params):
      outputs = model.apply({"params": params}, tokens, method="from_tokens")
      return jnp.mean(jax.nn.logsumexp(outputs["pixel_logits"], axis=-1))

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return value, table.unroll(flat_numpy(grads))

  expected, grads = gradient(model, variables["params"])
  for fields, tree in (({"scan_layers": False}, unrolled), ({"remat": "full"}, variables)):
    value, others = gradient(igpt.ImageGPT(**TINY, **fields), tree["params"])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert others.keys() == grads.keys()
    for key, grad in grads.items():
      np.testing.assert_allclose(others[key], grad, atol=1e-6)
      assert np.isfinite(grad).all()
      assert grad.any(), key


def test_outputs_have_expected_shapes_and_dtypes():
  model, variables = init_tiny(num_classes=5, depth=1)
  half, half_variables = init_tiny(num_classes=5, depth=1, dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(half_variables)} == {jnp.dtype("float32")}
  images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3)), jnp.float32)
  exact, rough = (jax.jit(m.apply)(variables, images) for m in (model, half))
  for outputs in (exact, rough):
    assert {k: (v.shape, v.dtype) for k, v in outputs.items()} == {
      "tokens": ((2, 16), jnp.int32),
      "pixel_logits": ((2, 16, 16), jnp.float32),
      "features": ((2, 16), jnp.float32),
      "layer_features": ((2, 2, 16), jnp.float32),
      "logits": ((2, 5), jnp.float32),
    }
  for key, value in exact.items():
    np.testing.assert_allclose(value, rough[key], atol=5e-2)  # bfloat16: 8 bits


@pytest.mark.parametrize("scan_layers", [True, False])
def test_cached_decoding_equals_full_forward_pass(scan_layers):
  model, variables = init_tiny(scan_layers=scan_layers)
  tokens = random_tokens()
  whole = model.apply(variables, tokens, method="from_tokens")["pixel_logits"]
  garbage = jnp.where(jnp.arange(16) < 5, tokens, 15 - tokens)
  _, state = model.apply(variables, garbage, method="from_tokens", mutable=["cache"])
  step = jax.jit(
    lambda state, previous, position: model.apply(
      {**variables, **state}, previous, position, method="next_logits", mutable=["cache"]
    )
  )
  for position in range(5, 16):
    logits, state = step(state, tokens[:, position - 1], position)
    np.testing.assert_allclose(logits, whole[:, position], atol=2e-6)


def test_complete_keeps_prefixes_and_rows_are_independent():
  model, variables = init_tiny()
  tokens = random_tokens(rows=5)
  lengths = jnp.array([0, 3, 8, 15, 16])
  complete = jax.jit(make_sampler(model, temperature=0.0))
  together = complete(variables, tokens, lengths, jax.random.key(0))
  others, other_lengths = random_tokens(rows=5, seed=2), jnp.full(5, 6)
  for row, length in enumerate(lengths):
    np.testing.assert_array_equal(together[row, :length], tokens[row, :length])
    mixed = others.at[row].set(tokens[row]), other_lengths.at[row].set(length)
    single = complete(variables, *mixed, jax.random.key(0))
    np.testing.assert_array_equal(together[row], single[row])
  whole = model.apply(variables, together, method="from_tokens")["pixel_logits"]
  sampled = np.arange(16) >= np.asarray(lengths)[:, None]
  np.testing.assert_array_equal(np.where(sampled, whole.argmax(-1), together), together)


def test_complete_ignores_tokens_after_prefix():
  model, variables = init_tiny()
  tokens, lengths = random_tokens(), jnp.array([0, 5])
  complete = jax.jit(make_sampler(model, temperature=0.0))
  expected = complete(variables, tokens, lengths, jax.random.key(0))
  filled = jnp.where(jnp.arange(16)[None] < lengths[:, None], tokens, 600)
  np.testing.assert_array_equal(complete(variables, filled, lengths, jax.random.key(0)), expected)


def test_sampling_of_deep_models_scans_layers(monkeypatch):
  """The program's size does not depend on the depth; samples equal those of unrolled layers."""
  model, variables = init_tiny()
  arguments = (random_tokens(), jnp.array([0, 5]), jax.random.key(0))
  unrolled = jax.jit(make_sampler(model))(variables, *arguments)
  for module in (igpt, transformer):
    monkeypatch.setattr(module, "UNROLLED_DEPTH", 1)
  np.testing.assert_array_equal(jax.jit(make_sampler(model))(variables, *arguments), unrolled)
  deeper, more = init_tiny(depth=4)
  programs = [
    jax.jit(make_sampler(m)).lower(v, *arguments) for m, v in [(model, variables), (deeper, more)]
  ]
  assert len({len(program.as_text().splitlines()) for program in programs}) == 1


def test_sampling_step_updates_cache_in_place():
  """Per step and layer, two arrays of a cache's size are written, both in place."""
  model, variables = init_tiny()
  arguments = (random_tokens(rows=3), jnp.zeros(3, jnp.int32), jax.random.key(0))
  text = jax.jit(make_sampler(model)).lower(variables, *arguments).compile().as_text()
  module = hlo.parse(text)
  loops = (i for lines in module.computations.values() for i in lines if i.opcode == "while")
  step = max((module.computations[loop.called[0]] for loop in loops), key=len)
  free = ("parameter", "tuple", "get-tuple-element", "bitcast")
  buffer = hlo.shape_bytes("f32[6,16,8]")  # 3 rows of 2 heads, 16 pixels
  written = [i.name for i in step if hlo.shape_bytes(i.shape) == buffer and i.opcode not in free]
  assert len(written) == 2 * model.depth
  assert all("dynamic-update-slice" in name for name in written)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda m, v: m.apply(v, jnp.zeros((1, 5, 5, 3))), "images: 5x5 .*num_positions=16 .*4x4"),
    (
      lambda m, v: m.apply(v, jnp.zeros((1, 17), jnp.int32), method="from_tokens"),
      "tokens: 17",
    ),
    (
      lambda m, v: igpt.complete(
        m, v, jnp.zeros((1, 17), jnp.int32), jnp.full(1, 17, jnp.int32), jax.random.key(0)
      ),
      "tokens: 17",
    ),
    (
      lambda m, v: m.apply(v, jnp.zeros((1, 4, 4, 3)), visible=jnp.ones((1, 16), bool)),
      "visible",
    ),
    (
      lambda m, v: m.apply({"params": v["params"]}, jnp.zeros((1, 4, 4, 3))),
      "no palette",
    ),
    (
      lambda m, v: make_sampler(igpt.ImageGPT(**TINY, causal=False))(
        v, random_tokens(), jnp.zeros(2, jnp.int32), jax.random.key(0)
      ),
      "causal, sos_token",
    ),
    (lambda m, v: init_tiny(depth=0), "depth"),
    (lambda m, v: init_tiny(num_classes=0), "num_classes"),
    (lambda m, v: init_tiny(num_heads=3), "num_heads"),
    (lambda m, v: init_tiny(remat="ful"), "'full'"),
  ],
)
def test_invalid_inputs_raise(call, message):
  model, variables = init_tiny()
  with pytest.raises(ValueError, match=message) as error:
    call(model, variables)
  assert "\n" not in str(error.value)


LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))


def sample_frequencies(**options):
  logits = jnp.broadcast_to(LOGITS, (4000, 4))
  options = {"temperature": 1.0, "top_k": None, **options}
  draw = jax.jit(lambda key: igpt.sample_token(key, logits, **options))
  return np.bincount(draw(jax.random.key(0)), minlength=4) / 4000


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, [0.1, 0.2, 0.3, 0.4]),
    ({"temperature": 0.5}, np.array([1, 4, 9, 16]) / 30),
    ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
    ({"top_k": 9}, [0.1, 0.2, 0.3, 0.4]),
    ({"temperature": 0.0}, [0, 0, 0, 1]),
    ({"top_k": 1}, [0, 0, 0, 1]),
  ],
)
def test_sample_frequencies_equal_probabilities(options, expected):
  np.testing.assert_allclose(sample_frequencies(**options), expected, atol=0.03)
  np.testing.assert_array_equal(sample_frequencies(**options) > 0, np.array(expected) > 0)


class Successor:
  """Predicts the last token plus one; the cache counts the calls."""

  shifts, scan_layers = True, False

  def apply(self, variables, tokens, position=None, *, method, mutable):
    assert mutable == ["cache"]
    if method == "from_tokens":
      return None, {"cache": 0}
    return self.next_logits(tokens, position), {"cache": variables["cache"] + 1}

  def next_logits(self, previous, position):
    return 50.0 * jax.nn.one_hot(jnp.where(position == 0, 0, previous + 1) % 10, 10)


def test_each_prefix_is_continued():
  tokens = jnp.array([[9, 9, 9, 9, 9], [3, 9, 9, 9, 9], [1, 5, 9, 9, 9], [1, 2, 3, 4, 5]])
  lengths = jnp.array([0, 1, 2, 5])
  sample = jax.jit(lambda t, n: igpt.complete(Successor(), {}, t, n, jax.random.key(0)))
  expected = [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [1, 5, 6, 7, 8], [1, 2, 3, 4, 5]]
  np.testing.assert_array_equal(sample(tokens, lengths), expected)


def test_common_prefix_is_skipped():
  calls = []

  class Recorder(Successor):
    def next_logits(self, previous, position):
      jax.debug.callback(lambda p: calls.append(int(p)), position)
      return super().next_logits(previous, position)

  tokens, lengths = jnp.zeros((2, 8), jnp.int32), jnp.array([5, 6])
  jax.block_until_ready(igpt.complete(Recorder(), {}, tokens, lengths, jax.random.key(0)))
  jax.effects_barrier()
  assert sorted(calls) == [5, 6, 7]


def test_samples_depend_on_key_and_row():
  class Uniform(Successor):
    def next_logits(self, previous, position):
      return jnp.zeros((previous.shape[0], 10))

  tokens = jnp.zeros((2, 30), jnp.int32)
  draw = jax.jit(lambda key: igpt.complete(Uniform(), {}, tokens, jnp.zeros(2, jnp.int32), key))
  one, again, other = (draw(jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
  assert (one[0] != one[1]).any()
  assert len(np.unique(one)) > 5
