"""Atomic writes: after an interruption there is either the old or the new file."""

import json
from typing import Any

from etils import epath


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file, text as UTF-8, surrogates escaped, and renames it; by one process only."""
  path = epath.Path(path)
  encoded = content if isinstance(content, bytes) else content.encode(errors="backslashreplace")
  unfinished = path.with_name(f"{path.name}.tmp")
  unfinished.write_bytes(encoded)
  unfinished.replace(path)


def write_json(path: epath.PathLike, content: Any) -> None:
  """Writes indented JSON."""
  write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
