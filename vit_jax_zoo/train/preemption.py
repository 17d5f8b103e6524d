"""Being told to stop: SIGTERM from a scheduler, or Ctrl-C, becomes a question the loop can ask."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils


class PreemptionGuard:
  """While it is entered, a request to stop is remembered in place of ending the process.

  In a process of its own, SIGTERM and the first SIGINT (Ctrl-C) count; a second SIGINT interrupts
  as ever. With `jax.distributed` initialised, JAX itself watches for SIGTERM on every host and lets
  all of them agree on a step, some steps after the signal, at which each is told; Ctrl-C interrupts
  at once.

      with PreemptionGuard() as guard:
        for step in ...:
          ...
          if guard.requested(step):
            save and leave
  """

  def __init__(self) -> None:
    self._flag = threading.Event()
    self._old_handlers: dict[signal.Signals, Any] = {}

  def __enter__(self) -> "PreemptionGuard":
    self._flag.clear()
    if _agrees_through_jax():
      return self
    if threading.current_thread() is not threading.main_thread():
      logging.warning("signals reach the main thread alone: SIGTERM will end this run unsaved")
      return self
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old_handlers[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *_: object) -> None:
    for number in list(self._old_handlers):
      self._restore(number)

  def requested(self, step: int) -> bool:
    """Says whether to save and leave after `step`.

    Args:
      step: every process must ask for every step, in order; all of them get the same answer.
    """
    if self._flag.is_set():
      return True
    if _agrees_through_jax() and multihost_utils.reached_preemption_sync_point(step):
      self._flag.set()
    return self._flag.is_set()

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._flag.set()
    if number == signal.SIGINT:  # the next Ctrl-C shall not wait for anything
      self._restore(signal.SIGINT)

  def _restore(self, number: signal.Signals) -> None:
    old = self._old_handlers.pop(number, None)
    signal.signal(number, signal.SIG_DFL if old is None else old)


def _agrees_through_jax() -> bool:
  return jax.distributed.is_initialized() and getattr(
    jax.config, "jax_enable_preemption_service", False
  )
