"""How all commands of the package speak to a shell: plain log lines, and errors of one line."""

import contextlib
import logging as python_logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging

from vit_jax_zoo.training import disk_errors as full_disk
from vit_jax_zoo.training import libtpu

USER_ERRORS = (
  ValueError, KeyError, AttributeError, TypeError, OSError, ImportError, RuntimeError,
  ArithmeticError, flags.Error,
)  # fmt: skip
"""What becomes one line; a command's `--traceback` shows the rest of it."""

EXIT_ERROR = 2


@contextlib.contextmanager
def one_line_errors(*, show_traceback: bool) -> Iterator[None]:
  """Turns what a user can cause into one line on stderr and exit status 2.

  Args:
    show_traceback: also says where in the code the error arose.

  Raises:
    SystemExit: in place of any of `USER_ERRORS`.
  """
  try:
    yield
  except USER_ERRORS as error:
    if show_traceback:
      traceback.print_exc()
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(message).split())
    if full_disk.is_full(error):
      text += "; make room, and give the same command again"
    print(f"error: {text}", file=sys.stderr)  # noqa: T201 the one place that speaks to a shell
    raise SystemExit(EXIT_ERROR) from None


def run(
  main: Callable[[Sequence[str]], int],
  define_flags: Callable[[], None] | None = None,
  parse: Callable[[list[str]], list[str]] | None = None,
) -> None:
  """Runs a command, and ends the process with its exit status.

  Args:
    main: takes the command's name, and what is left of its arguments.
    define_flags: defines the command's flags, `--traceback` among them, if importing did not.
    parse: parses them; `parse_flags` by default.
  """

  def main_or_one_line(argv: Sequence[str]) -> int:
    with one_line_errors(show_traceback=flags.FLAGS.traceback):
      return main(argv)

  log_plainly()
  if define_flags is not None:
    define_flags()
  app.run(main_or_one_line, flags_parser=parse or parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags, and returns what is left."""
  with one_line_errors(show_traceback="--traceback" in argv):
    return flags.FLAGS(argv)


def parse_flags_and_overrides(argv: list[str]) -> list[str]:
  """Parses flags; leaves those that set fields of the config, `--config.section.field=value`."""
  sys.path.insert(0, os.getcwd())  # configs import configs.common
  is_override = [a.startswith("-") and a.lstrip("-").startswith("config.") for a in argv]
  with one_line_errors(show_traceback="--traceback" in argv):
    rest = flags.FLAGS([a for a, override in zip(argv, is_override, strict=True) if not override])
    return [*rest, *(a for a, override in zip(argv, is_override, strict=True) if override)]


def log_plainly() -> None:
  """Logs as time and text, and leaves out what other libraries merely have to report.

  In a notebook as well, where no absl application has begun.
  """
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  handler.addFilter(_is_ours_or_serious)
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = _report_unless_known
  libtpu.silence_if_idle()


def _is_ours_or_serious(record: python_logging.LogRecord) -> bool:
  """Orbax alone writes pages of what it has done, and traces of what it raises to us as well."""
  if record.exc_info and ("orbax" in record.pathname or record.name == "asyncio"):
    return False
  return record.levelno >= python_logging.WARNING or "vit_jax_zoo" in record.pathname


def _report_unless_known(report: Any) -> None:
  """Orbax raises the first of several errors to us; TensorStore's threads come with the others.

  By then nobody waits for them: the event loop is closed, or the coroutine is being thrown away.
  """
  code = [frame.filename for frame in traceback.extract_tb(report.exc_traceback)]
  is_late = str(report.exc_value) == "Event loop is closed"
  if not (is_late or any("orbax" in filename for filename in code)):
    sys.__unraisablehook__(report)
