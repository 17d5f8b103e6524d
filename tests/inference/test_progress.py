"""Progress on terminals and in logs."""

import io

import rich.console

from vit_jax_zoo.inference import progress


def test_progress_is_logged_or_shown_as_bar_on_terminal(monkeypatch):
  lines, items = [], [1, 2, 3]
  monkeypatch.setattr(progress, "_LOG_SECONDS", -1)
  monkeypatch.setattr(progress.logging, "info", lambda form, *args: lines.append(form % args))
  assert list(progress.track(items, "searching", 3, "windows")) == items
  assert lines == [f"searching: {i} windows of 3, ETA 0:00:00" for i in items]
  assert list(progress.track(iter(items), "predicting", None, "frames")) == items
  assert lines[3:] == [f"predicting: {i} frames" for i in items]
  monkeypatch.setattr(progress, "_LOG_SECONDS", 60)
  assert list(progress.track(items, "searching", 3, "windows")) == items
  assert len(lines) == 6
  shown = io.StringIO()
  terminal = rich.console.Console(file=shown, force_terminal=True)
  monkeypatch.setattr(progress.rich.console, "Console", lambda **_: terminal)
  for _ in progress.track(items, "predicting", 3, "images"):  # one bar at a time
    assert list(progress.track(items, "enlarging", 3, "windows")) == items
  assert "predicting" in shown.getvalue()
  assert "100%" in shown.getvalue()
  assert "enlarging" not in shown.getvalue()
