"""iGPT's claims (Chen et al., "Generative Pretraining from Pixels", ICML 2020) on digits.

python -m benchmarks.claims.igpt
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.claims import common
from benchmarks.claims.common import Part, Setting, table_of

DEPTHS = (2, 4, 6)
NATS, PROBE = "test/nats", "probe/accuracy"
STEPS = 800
SHARES = ("25%", "50%", "75%", "100%")
DIGITS = {"source": "demo:digits", "transforms": [{"name": "decode"}]}
FIELDS = {
  "data.eval": {  # without completions
    "test": {**DIGITS, "split": "test"},
    "probe": {**DIGITS, "fit_split": "train", "split": "test"},
  },
  "num_steps": STEPS,
  "batch_size": 32,
  "eval_every": STEPS // 4,
  "checkpoint.every": 0,
}


def gray_levels(count: int) -> Callable[[pathlib.Path, bool], Mapping[str, Any]]:
  """Returns the preparation of a palette of equidistant gray levels, instead of a fitted one."""

  def write(folder: pathlib.Path, toy: bool) -> Mapping[str, Any]:  # noqa: FBT001
    del toy
    levels = np.repeat(np.linspace(-1, 1, count, dtype=np.float32)[:, None], 3, axis=1)
    np.save(folder / f"gray{count}.npy", levels)
    return {"task.palette": str(folder / f"gray{count}.npy")}

  return write


def _demo(
  depth: int = 6, fields: Mapping[str, Any] | None = None, colors: int = 16, **more: Any
) -> Setting:
  scores = (NATS, PROBE, "probe/pixels", "probe/best_layer")
  scores += tuple(f"probe/layer_{i}" for i in range(depth + 1))
  fields = FIELDS | {"model.depth": depth} | (fields or {})
  return Setting(f"igpt:demo,num_colors={colors}", fields, scores, (NATS, PROBE), **more)


def _depth(depth: int) -> str:
  return f"depth {depth}"


BASE = _depth(6)
SETTINGS = {_depth(depth): _demo(depth) for depth in DEPTHS} | {
  "masked pixels": _demo(fields={"model.causal": False}),
  # Digits have 17 gray levels: 16 would be the palette.
  "palette of 4": _demo(colors=4),
  "4 gray levels": _demo(colors=4, prepare=gray_levels(4)),
}

PARTS = (
  Part(
    key="depth",
    columns=table_of(
      {f"{depth}": _depth(depth) for depth in DEPTHS},
      {
        "nats per pixel": NATS,
        "probe accuracy": PROBE,
        "best layer": "probe/best_layer",
        "raw pixels": "probe/pixels",
        "parameters": "parameters",
      },
    ),
    rows="depth",
    axis="probe accuracy",
    plotted=("probe accuracy", "raw pixels"),
    compared={
      "Six layers have a lower loss than two": ((_depth(2), NATS), (BASE, NATS)),
      "Six layers have a higher probe accuracy than two": ((BASE, PROBE), (_depth(2), PROBE)),
    },
  ),
  Part(
    key="training",
    columns={
      "probe accuracy": {share: (BASE, f"{PROBE} at {share}") for share in SHARES},
      "nats per pixel": {share: (BASE, f"{NATS} at {share}") for share in SHARES},
    },
    rows="share of the steps",
    axis="probe accuracy",
    compared={
      "The loss falls from a quarter to the end": (
        (BASE, f"{NATS} at 25%"),
        (BASE, f"{NATS} at 100%"),
      ),
      "Probe accuracy rises from a quarter to the end": (
        (BASE, f"{PROBE} at 100%"),
        (BASE, f"{PROBE} at 25%"),
      ),
    },
  ),
  Part(
    key="layers",
    columns={"probe accuracy": {f"{i}": (BASE, f"probe/layer_{i}") for i in range(7)}},
    rows="layer",
    axis="probe accuracy",
    compared={"Layer 3 above the last": ((BASE, "probe/layer_3"), (BASE, "probe/layer_6"))},
  ),
  Part(
    key="objective",
    columns=table_of(
      {"autoregressive": BASE, "masked pixels": "masked pixels"},
      {"probe accuracy": PROBE, "nats per pixel": NATS},
    ),
    rows="objective",
    axis="probe accuracy",
    ordered=False,
    compared={"Autoregressive above masked": ((BASE, PROBE), ("masked pixels", PROBE))},
  ),
  Part(
    key="palette",
    columns=table_of(
      {
        "palette of 16": BASE,
        "palette of 4": "palette of 4",
        "4 gray levels": "4 gray levels",
      },
      {"probe accuracy": PROBE, "nats per pixel": NATS},
    ),
    rows="colors",
    axis="probe accuracy",
    ordered=False,
    compared={
      "The palette of 4 above 4 gray levels": (("palette of 4", PROBE), ("4 gray levels", PROBE)),
    },
  ),
)

if __name__ == "__main__":
  common.main("igpt")
