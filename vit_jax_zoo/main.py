"""Trains and evaluates what a config says.

    python -m vit_jax_zoo.main --config=configs/vit.py
    python -m vit_jax_zoo.main --config=configs/vit.py:s16_imagenet --workdir=gs://bucket/run
    python -m vit_jax_zoo.main --config=configs/vit.py --config.optimizer.learning_rate=3e-4

The same command again goes on where the run had come; when it is complete, it scores it once more.
"""

import contextlib
import logging as python_logging
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from vit_jax_zoo import config, experiment
from vit_jax_zoo.train import distributed
from vit_jax_zoo.train.loop import Outcome

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "configs/<system>.py[:variant][,field=value...]", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "default: runs/<config>_<variant>")
EVALUATE_ONLY = flags.DEFINE_bool("evaluate_only", False, "score the last checkpoint")
OVERFIT = flags.DEFINE_bool(
  "overfit_one_batch", False, "train on one batch: is the model broken, or just slow to learn?"
)
PROFILE = flags.DEFINE_string("profile", None, "steps to trace, first:last, such as 10:15")
ALLOW_CHANGE = flags.DEFINE_bool(
  "allow_config_change", False, "resume although the config is not the one the run began with"
)
TRACEBACK = flags.DEFINE_bool("traceback", False, "show where in the code an error arose")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes the run has")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")

EXIT_STOPPED = 143
"""128 + SIGTERM: a run that was told to stop, has saved its state, and is not finished."""


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns the process's exit status."""
  if len(argv) > 1:
    raise ValueError(f"unexpected argument {argv[1]!r}; options begin with --")
  if CONFIG.value is None:
    raise ValueError("--config is missing; try --config=configs/vit.py")
  distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
  if not distributed.is_primary():
    logging.set_verbosity(logging.WARNING)
  workdir = epath.Path(WORKDIR.value or default_workdir(_config_argument()))
  options = experiment.RunOptions(
    evaluate_only=EVALUATE_ONLY.value,
    overfit_one_batch=OVERFIT.value,
    profile=parse_window(PROFILE.value),
    allow_config_change=ALLOW_CHANGE.value,
  )
  outcome = experiment.run(CONFIG.value, workdir, options)
  if distributed.is_primary():
    _say_where(outcome, workdir)
  return 0 if outcome.finished else EXIT_STOPPED


def default_workdir(config_argument: str) -> str:
  """Returns runs/<config>_<variant and fields> for the text behind --config=.

  >>> default_workdir("configs/vit.py:b16_imagenet,image_size=384")
  'runs/vit_b16_imagenet_image_size_384'
  >>> default_workdir("configs/vit.py")
  'runs/vit_demo'
  """
  path, _, argument = config_argument.partition(":")
  words = "".join(c if c.isalnum() or c in "._-" else "_" for c in argument or "demo")
  return f"runs/{pathlib.Path(path).stem}_{words}"


def parse_window(text: str | None) -> tuple[int, int] | None:
  """Reads "first:last" as a half-open window of steps.

  Raises:
    ValueError: it is not two increasing positive numbers.
  """
  if text is None:
    return None
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and 0 < int(first) < int(last)):
    raise ValueError(f"--profile={text} is not a window of steps; write first:last, such as 10:15")
  return int(first), int(last)


def _config_argument() -> str:
  return next(a.split("=", 1)[1] for a in reversed(sys.argv) if a.lstrip("-").startswith("config="))


def _say_where(outcome: Outcome, workdir: epath.Path) -> None:
  """Says what came out of the run, and where everything lies."""
  step = int(outcome.state.step)
  if outcome.finished:
    scores = "  ".join(f"{name} {value:.4g}" for name, value in outcome.scores.items())
    logging.info("done after %d steps: %s", step, scores or "(the config names no evaluation)")
  else:
    logging.info("stopped by a signal after step %d; the same command goes on from there", step)
  places = {
    "checkpoints": workdir / "checkpoints",
    "TensorBoard": f"tensorboard --logdir={workdir}",
    "metrics": workdir / "metrics.jsonl",
    "pictures": workdir / "figures",
  }
  for name, place in places.items():
    logging.info("  %-12s %s", name, place)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; what is wrong with a config is found before absl wraps it in a traceback."""
  sys.path.insert(0, os.getcwd())  # configs import configs.common
  with _one_line_errors(show_traceback="--traceback" in argv):
    given = [a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config=")]
    if given:
      config.check_overrides(config.complete(config.load(given[-1])), argv)
    return flags.FLAGS(argv)


@contextlib.contextmanager
def _one_line_errors(*, show_traceback: bool) -> "contextlib.Iterator[None]":
  """Turns what a user can cause into one line on stderr and exit status 2."""
  try:
    yield
  except (ValueError, KeyError, AttributeError, OSError, ArithmeticError, flags.Error) as error:
    if show_traceback:
      traceback.print_exc()
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(message).split())
    print(f"error: {text}", file=sys.stderr)  # noqa: T201 the one place that speaks to a shell
    raise SystemExit(2) from None


def _main_or_one_line(argv: Sequence[str]) -> int:
  with _one_line_errors(show_traceback=TRACEBACK.value):
    return main(argv)


def run() -> None:
  """The command's entry point."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  handler.addFilter(_is_ours_or_serious)
  app.run(_main_or_one_line, flags_parser=_parse_flags)


def _is_ours_or_serious(record: python_logging.LogRecord) -> bool:
  """Leaves out what other libraries merely have to report: Orbax writes pages of it."""
  return record.levelno >= python_logging.WARNING or "vit_jax_zoo" in record.pathname


if __name__ == "__main__":
  run()
