"""Command lines of all commands: flag parsing, log format, one-line errors."""

import contextlib
import logging as python_logging
import os
import pathlib
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from vit_jax_zoo.errors import escape_controls, one_line
from vit_jax_zoo.training import disk, host

USER_ERRORS = (
  ValueError, KeyError, AttributeError, TypeError, OSError, ImportError, RuntimeError,
  ArithmeticError, MemoryError, flags.Error,
)  # fmt: skip
"""Errors that are printed in one line; `--traceback` also prints their traceback."""


def _report_interrupt(kind: type[BaseException], error: BaseException, trace: Any) -> None:
  if issubclass(kind, KeyboardInterrupt):
    print("interrupted", file=sys.stderr)  # noqa: T201
  else:
    sys.__excepthook__(kind, error, trace)


def _report_unraisable(report: Any) -> None:
  """Drops errors of TensorStore's threads, the first of which Orbax raises.

  Repeats a Ctrl-C that was lost in a callback of the garbage collector (JAX registers one).
  """
  if issubclass(report.exc_type, KeyboardInterrupt):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    return
  files = [frame.filename for frame in traceback.extract_tb(report.exc_traceback)]
  if not any("orbax" in file or "asyncio" in file for file in files):
    sys.__unraisablehook__(report)


# Set on import: importing a command takes seconds.
sys.excepthook = _report_interrupt
if sys.unraisablehook is sys.__unraisablehook__:
  sys.unraisablehook = _report_unraisable


@contextlib.contextmanager
def one_line_errors(*, show_traceback: bool) -> Iterator[None]:
  """Prints `USER_ERRORS` in one line on stderr and exits with status 2."""
  try:
    yield
  except USER_ERRORS as error:
    if show_traceback:
      traceback.print_exc()
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = one_line(f"{_flag_of(error)}{str(message) or type(error).__name__}")
    if disk.is_full(error):
      text += "; free disk space and run the same command again"
    print(f"error: {text}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2) from None


def show(text: str) -> None:
  """Prints a result; exits with SIGPIPE's status if stdout's reader has ended, such as `head`."""
  try:
    print(escape_controls(text), flush=True)  # noqa: T201
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout again at the end
    raise SystemExit(128 + signal.SIGPIPE) from None


def _flag_of(error: Exception) -> str:
  """Returns "--flag: " if an error's file is in the file or folder of a flag, else ""."""
  if not (file := getattr(error, "filename", None)) or not flags.FLAGS.is_parsed():
    return ""
  file, values = pathlib.Path(str(file)).absolute(), flags.FLAGS.flag_values_dict()
  paths = {k: pathlib.Path(x).absolute() for k, x in values.items() if isinstance(x, str) and x}
  return next((f"--{k}: " for k, x in paths.items() if x in (file, *file.parents)), "")


def run(
  main: Callable[[Sequence[str]], int],
  define_flags: Callable[[], None] | None = None,
  renamed: Mapping[str, str] | None = None,
) -> None:
  """Runs a command, exits with its status; `renamed` maps old flags (errors) to new ones.

  If it has a flag `config`, overrides `--config.section.field=value` are arguments of `main`.
  """

  def parse(argv: list[str]) -> list[str]:
    if {"--help", "-help", "-h", "--helpshort"} & set(argv[1:]):
      show(help_text(main))
      raise SystemExit(0)
    for argument in argv[1:]:
      name = argument.lstrip("-").partition("=")[0]
      if argument.startswith("-") and renamed and name in renamed:
        raise ValueError(f"--{name} is now --{renamed[name]}")
    overrides = [a for a in argv if a.startswith("-") and a.lstrip("-").startswith("config.")]
    overrides = overrides if "config" in flags.FLAGS else []
    return [*flags.FLAGS([a for a in argv if a not in overrides]), *overrides]

  host.keep_freed_memory()  # before log_plainly, whose libtpu settings resemble a TPU host's
  log_plainly()
  if define_flags is not None:
    define_flags()
  if "traceback" not in flags.FLAGS:  # a process may run several commands
    text = "show the traceback of an error"
    flags.DEFINE_bool("traceback", False, text, module_name="vit_jax_zoo.cli")
  with one_line_errors(show_traceback="--traceback" in sys.argv):
    app.run(main, flags_parser=parse)


def help_text(main: Callable[[Sequence[str]], int]) -> str:
  """Returns a command's usage, its module's docstring, and its own flags with their defaults."""
  module = main.__globals__["__spec__"].name.removesuffix(".__main__")
  python = f"python -m {module}"
  program = sys.argv[0] if sys.argv[0].startswith("vit-jax-zoo ") else python
  summary, _, text = (main.__globals__["__doc__"] or "").strip().partition("\n\n")
  usage = f"{summary}\n\nusage: {program} [--flag=value ...]\n\nexamples:\n\n"
  lines = [usage + text.replace(python, program), "", "flags:"]
  modules = flags.FLAGS.flags_by_module_dict()
  ours = [name for name in modules if name == sys.argv[0] or name.startswith("vit_jax_zoo")]
  for flag in (flag for name in ours for flag in modules[name]):
    is_bool = flag.flag_type() == "bool"
    negation = "[no]" if is_bool and not flag.name.startswith("no_") else ""
    default = "none" if flag.default in (None, [], "") else str(flag.default_as_str).strip("'")
    shown = "" if "default: " in flag.help else f" (default: {default})"
    lines.append(f"  --{negation}{flag.name}{'' if is_bool else '=...'}")
    text = textwrap.fill(f"{' '.join(flag.help.split())}{shown}", 86)
    lines.append(textwrap.indent(text, " " * 6))
  return "\n".join([*lines, "", "--helpfull also lists the flags of the libraries."])


def log_plainly() -> None:
  """Logs time and text, and only warnings of other libraries; in notebooks too."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  handler.addFilter(_is_logged)
  host.silence_libtpu()


class _Formatter(python_logging.Formatter):
  def format(self, record: python_logging.LogRecord) -> str:
    text = escape_controls(super().format(record))
    is_one_line = "vit_jax_zoo" in record.pathname and record.levelno >= python_logging.WARNING
    return text.replace("\n", "\\n") if is_one_line and not record.exc_info else text


def _is_logged(record: python_logging.LogRecord) -> bool:
  """Drops other libraries' info lines, and Orbax's tracebacks of errors that it also raises."""
  if record.exc_info and ("orbax" in record.pathname or record.name == "asyncio"):
    return False
  return record.levelno >= python_logging.WARNING or "vit_jax_zoo" in record.pathname
