"""Progress of long computations: a bar on a terminal, else log lines."""

import datetime
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import rich.console
import rich.progress
from absl import logging

_LOG_SECONDS = 10
_shown: list[str] = []  # a terminal has one bar at a time


def track(items: Iterable[Any], what: str, total: int | None, unit: str) -> Iterator[Any]:
  """Yields items with a bar below the output, or a log line at most every 10 s."""
  console = rich.console.Console(stderr=True)
  if console.is_terminal and not _shown and total != 1:
    _shown.append(what)
    columns = *rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn()
    options = {"transient": True, "redirect_stdout": sys.stdout.isatty()}
    try:
      with rich.progress.Progress(*columns, console=console, **options) as bar:
        yield from bar.track(items, total, description=what)
    finally:
      _shown.clear()
    return
  start = logged = time.monotonic()
  for done, item in enumerate(items, 1):
    yield item
    if (now := time.monotonic()) - logged > _LOG_SECONDS:
      logged, left = now, round((now - start) / done * max(0, (total or 0) - done))
      eta = f" of {total}, ETA {datetime.timedelta(seconds=left)}" if total else ""
      logging.info("%s: %d %s%s", what, done, unit, eta)
