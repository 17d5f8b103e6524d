"""Feature probes by name: main score, layer selection, errors."""

import numpy as np
import pytest

from vit_jax_zoo.metrics.feature_probes import (
  PROBES,
  FeatureScore,
  Labelled,
  around,
  by_layer,
  choose_features,
  create_probe,
)

FAST = {"linear_sgd": {"num_epochs": 10, "rates": [0.3, 0.03]}}


def labelled(rows, seed):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, rows)
  good = rng.normal(0, 1, (rows, 4)) + 5 * np.eye(4)[labels]
  noise = rng.normal(0, 1, (rows, 4))
  features = {"layer_0": noise, "layer_1": good, "pixels": noise}
  return Labelled({k: v.astype(np.float32) for k, v in features.items()}, labels)


@pytest.mark.parametrize("name", PROBES)
def test_informative_layer_selected(name):
  found = create_probe(name, **FAST.get(name, {}))(labelled(300, 0), labelled(200, 1))
  assert choose_features(found) == "layer_1"
  assert found["layer_1"].scores["accuracy"] > 0.95
  assert found["layer_0"].scores["accuracy"] < 0.5


def test_main_score_five_shots_twenty_neighbours():
  fit, test = labelled(300, 0), labelled(200, 1)
  fit, test = (Labelled({"features": x.features["layer_0"]}, x.labels) for x in (fit, test))
  few = create_probe("few_shot")(fit, test)["features"]
  assert few.validation is None  # no hyperparameter to select, so nothing held out
  assert set(few.scores) == {"accuracy"} | {
    f"{n}_shot{suffix}" for n in (1, 5, 10, 25) for suffix in ("", "_std")
  }
  assert few.scores["accuracy"] == few.scores["5_shot"]
  near = create_probe("knn", neighbours=[1, 20, 30])(fit, test)["features"].scores
  assert near["accuracy"] == near["20_nn"]
  assert near["20_nn"] != near["1_nn"]


def test_selection_by_validation_score():
  found = {
    "layer_0": FeatureScore({"accuracy": 0.9}, 0.1),
    "layer_1": FeatureScore({"accuracy": 0.2}, 0.3),
    "pixels": FeatureScore({"accuracy": 1.0}, 1.0),
  }
  assert choose_features(found) == "layer_1"


@pytest.mark.parametrize("name", ["linear", "linear_sgd"])
def test_held_out_rows_given(name):
  fit, test = labelled(120, 0), labelled(50, 1)
  fit = Labelled({"features": fit.features["layer_1"]}, fit.labels.copy())
  test = Labelled({"features": test.features["layer_1"]}, test.labels)
  held_out = np.arange(120) >= 100
  fit.labels[100:] = (fit.labels[100:] + 1) % 3
  found = create_probe(name, **FAST.get(name, {}))(fit, test, held_out)["features"]
  assert found.validation == pytest.approx(0, abs=0.1)  # all held-out labels are wrong


def test_by_layer_zero_padded_names():
  layers = np.arange(2 * 11 * 3.0).reshape(2, 11, 3)
  found = by_layer({"layers": layers, "pixels": np.zeros((2, 5))})
  assert list(found)[:2] == ["layer_00", "layer_01"]
  np.testing.assert_array_equal(found["layer_10"], layers[:, 10])
  assert set(by_layer({"features": np.zeros((2, 5))})) == {"features"}


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("fewshot", {}, "probe 'fewshot'.*'few_shot'"),
    ("few_shot", {"shot": [1]}, "probe 'few_shot' 'shot'.*'shots'"),
    ("knn", {"neighbours": ()}, "neighbours"),
  ],
)
def test_invalid_probe_raises(name, fields, message):
  with pytest.raises(ValueError, match=message):
    create_probe(name, **fields)


def test_concatenated_layers_around_best():
  """A label of three bits: one layer has one of them, the next has two, the others none."""

  def bits(rows, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 8, rows)
    first, second, third = (3 * ((labels >> i) & 1) for i in range(3))
    signals = {1: [first] * 4, 2: [second, second, third, third]}
    features = {"pixels": rng.normal(0, 1, (rows, 4))}
    for i in range(5):
      signal = np.stack(signals[i], axis=1) if i in signals else 0
      features[f"layer_{i}"] = rng.normal(0, 0.5, (rows, 4)) + signal
    return Labelled({k: v.astype(np.float32) for k, v in features.items()}, labels)

  fit, test = bits(600, 0), bits(300, 1)
  fields = {"shots": [30], "seeds": [0]}
  found = create_probe("few_shot", concatenate=3, **fields)(fit, test)
  assert choose_features(found) == "layer_2"
  assert found["layer_2"].scores["accuracy"] < 0.6
  assert found["concatenated"].scores["accuracy"] > 0.9
  three = [f"layer_{i}" for i in (1, 2, 3)]
  joined, joined_test = (
    np.concatenate([x.features[n] for n in three], axis=1) for x in (fit, test)
  )
  by_hand = create_probe("few_shot", **fields)(
    Labelled({"x": joined}, fit.labels), Labelled({"x": joined_test}, test.labels)
  )
  assert found["concatenated"].scores == by_hand["x"].scores


def test_around_stays_inside_stack():
  layers = [f"layer_{i}" for i in range(7)]
  assert around(layers, "layer_3", 5) == layers[1:6]
  assert around(layers, "layer_0", 5) == layers[:5]
  assert around(layers, "layer_6", 5) == layers[2:]
  with pytest.raises(ValueError, match="concatenate: 9"):
    around(layers, "layer_3", 9)
  with pytest.raises(ValueError, match="concatenate: 4"):
    create_probe("linear", concatenate=4)


@pytest.mark.parametrize("name", ["linear", "linear_sgd"])
def test_views_vote(name):
  """Each view alone is often wrong, but in different images; the vote is right."""
  fit, test = labelled(300, 0), labelled(100, 1)
  good = test.features["layer_1"]
  others = np.roll(good, 1, axis=0)  # mostly of another class
  views = np.stack([good, good, good, others, others[::-1]], axis=1)
  train = Labelled({"features": fit.features["layer_1"]}, fit.labels)
  probe = create_probe(name, **FAST.get(name, {}))
  accuracy_of = lambda x: probe(train, Labelled({"features": x}, test.labels))["features"].scores  # noqa: E731
  assert accuracy_of(views)["accuracy"] == accuracy_of(good)["accuracy"] > 0.95
  assert accuracy_of(views[:, ::-1][:, :3])["accuracy"] < 0.8  # one informative view of three
  assert accuracy_of(views[:, 3])["accuracy"] < 0.6


def test_probes_without_vote_use_first_view():
  fit, test = labelled(300, 0), labelled(100, 1)
  views = np.stack([test.features["layer_1"], np.zeros((100, 4), np.float32)], axis=1)
  train = Labelled({"features": fit.features["layer_1"]}, fit.labels)
  found = create_probe("knn")(train, Labelled({"features": views}, test.labels))
  assert found["features"].scores["accuracy"] > 0.95
