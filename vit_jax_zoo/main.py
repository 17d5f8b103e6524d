"""Trains and evaluates what a config says.

    python -m vit_jax_zoo.main --config=configs/vit.py
    python -m vit_jax_zoo.main --config=configs/vit.py:s16_imagenet --workdir=gs://bucket/run
    python -m vit_jax_zoo.main --config=configs/vit.py --config.optimizer.learning_rate=3e-4

The same command again goes on where the run had come; when it is complete, it scores it once more.
"""

import hashlib
import pathlib
from collections.abc import Sequence

from absl import flags, logging
from etils import epath

from vit_jax_zoo import cli as command_line
from vit_jax_zoo import config as config_lib
from vit_jax_zoo import trainer as experiment
from vit_jax_zoo.training import distributed
from vit_jax_zoo.training.loop import Outcome, in_words

CONFIG = flags.DEFINE_string(
  "config",
  None,
  "configs/<system>.py[:variant][,field=value...]; --config.section.field=value sets any field",
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
flags.DEFINE_bool("traceback", False, "show where in the code an error arose")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes the run has")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")

_LONGEST = 120
"""So many letters of the config's argument are in the name of a run's folder."""

EXIT_STOPPED = 143
"""128 + SIGTERM: a run that was told to stop, has saved its state, and is not finished."""


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns the process's exit status.

  Args:
    argv: the command's name, and what absl has left of its arguments: overrides of config fields.
  """
  if CONFIG.value is None:
    raise ValueError("--config is missing; try --config=configs/vit.py")
  config = config_lib.load_with_overrides(CONFIG.value, argv[1:])
  distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
  if not distributed.is_primary():
    logging.set_verbosity(logging.WARNING)
  workdir = epath.Path(WORKDIR.value or default_workdir(CONFIG.value))
  options = experiment.RunOptions(
    evaluate_only=EVALUATE_ONLY.value,
    overfit_one_batch=OVERFIT.value,
    profile=parse_window(PROFILE.value),
    allow_config_change=ALLOW_CHANGE.value,
  )
  outcome = experiment.run(config, workdir, options)
  if distributed.is_primary():
    _say_where(outcome)
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
  if len(words) > _LONGEST:  # file systems have a limit, and paths of data may be long
    words = f"{words[:_LONGEST]}_{hashlib.blake2b(words.encode(), digest_size=4).hexdigest()}"
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


def _say_where(outcome: Outcome) -> None:
  """Says what came out of the run, and where everything lies."""
  step, workdir = int(outcome.state.step), outcome.workdir
  if outcome.finished:
    scores = in_words(outcome.scores) or "(the config names no evaluation)"
    logging.info("done after %d steps: %s", step, scores)
  else:
    logging.info("stopped by a signal after step %d; the same command goes on from there", step)
  places = {"checkpoints": "checkpoints", "metrics": "metrics.jsonl", "pictures": "figures"}
  for name, place in places.items():
    if (workdir / place).exists():
      logging.info("  %-12s %s", name, workdir / place)
  if (workdir / "metrics.jsonl").exists():
    logging.info("  %-12s tensorboard --logdir=%s", "TensorBoard", workdir)


if __name__ == "__main__":
  command_line.run(main, parse=command_line.parse_flags_and_overrides)
