"""Published checkpoint formats: detects the format of a file, reads it, writes a model in it.

A system registers its formats (`registry.Format`). A format's module has three functions:

* `is_of(arrays) -> bool`: whether a file with these keys has this format;
* `read_checkpoint(published) -> Checkpoint`: from what `readers.read_published` returns;
* `write_checkpoint(path, export)`: the inverse, a file or folder at `path`; WeightsError where the
  format has no such model. A format that can only be read has none.
"""

import functools
from types import ModuleType

from vit_jax_zoo.registry import Format, load_reference, systems
from vit_jax_zoo.weights.checkpoint import Checkpoint
from vit_jax_zoo.weights.key_map import WeightsError
from vit_jax_zoo.weights.readers import read_published


@functools.cache
def formats() -> dict[Format, ModuleType]:
  """Returns the formats of all systems with their modules, in the order in which they are tried."""
  return {
    form: load_reference(name, form.module)
    for name, system in systems().items()
    for form in system.formats
  }


def read_checkpoint(path: str) -> Checkpoint:
  """Reads a published file or folder of any registered format; WeightsError if it cannot be read.

  Raises ImportError if a package needed for reading is not installed.
  """
  published = read_published(path)
  found = next((item for item in formats().items() if item[1].is_of(published.arrays)), None)
  if found is None:
    keys = ", ".join(sorted(published.arrays)[:3]) or "none"
    known = ", ".join(dict.fromkeys(form.description for form in formats()))
    raise WeightsError(f"{path} holds no weights of {known}; its keys begin with {keys}")
  form, module = found
  try:
    return module.read_checkpoint(published)
  except (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
    # Raised where sizes are inferred from missing or misshapen arrays.
    what = f"no {error}" if isinstance(error, KeyError) else f"a wrong shape somewhere ({error})"
    raise WeightsError(
      f"{path} looks like {form.description}, but its sizes cannot be inferred: there is {what}"
    ) from None


def writable_formats(family: str) -> dict[str, ModuleType]:
  """Returns the modules of the formats in which a model family can be written, by format name."""
  return {
    form.name: module
    for form, module in formats().items()
    if form.family == family and hasattr(module, "write_checkpoint")
  }
