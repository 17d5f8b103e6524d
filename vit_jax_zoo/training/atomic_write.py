"""Files that are written in one step: a kill, or another process, meets the old one or the new."""

import json
from typing import Any

from etils import epath


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file beside its place, and renames it into it.

  Args:
    path: of one process only, or of who has it to himself.
    content: text is written as UTF-8.
  """
  path = epath.Path(path)
  encoded = content if isinstance(content, bytes) else content.encode()
  unfinished = path.with_name(f"{path.name}.tmp")
  unfinished.write_bytes(encoded)
  unfinished.replace(path)


def write_json(path: epath.PathLike, content: Any) -> None:
  """Writes JSON that people may read too."""
  write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
