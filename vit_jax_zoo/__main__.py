"""The command `vit-jax-zoo`, also `python -m vit_jax_zoo`: runs the module of a subcommand.

vit-jax-zoo train --config=vit
vit-jax-zoo predict --model=runs/vit_demo --images=a.jpg
vit-jax-zoo predict --help
"""

import runpy
import sys

from vit_jax_zoo import __version__
from vit_jax_zoo.errors import unknown_name

COMMANDS = {
  "train": ("vit_jax_zoo.main", "train and evaluate a config; the same command resumes the run"),
  "predict": ("vit_jax_zoo.predict", "apply a model to images: JSON, and annotated images"),
  "export": ("vit_jax_zoo.export", "write a model in the format of another library"),
  "transfer": ("vit_jax_zoo.transfer", "evaluate a model's features on other datasets"),
  "app": ("vit_jax_zoo.app", "a web page that applies models to dropped images"),
  "plan": ("vit_jax_zoo.plan", "memory and speed of a config on a machine that you do not have"),
  "prepare": ("vit_jax_zoo.data.prepare", "pack a dataset as ArrayRecord files"),
}
"""Module and summary of each subcommand."""


def main() -> None:
  """Runs the subcommand of `sys.argv`; without one, prints the table of subcommands."""
  name, *arguments = sys.argv[1:] or ["--help"]
  if name == "--version":
    print(__version__)  # noqa: T201
  elif name in ("--help", "-h", "help"):
    rows = "\n".join(f"  {command:10} {text}" for command, (_, text) in COMMANDS.items())
    examples = (__doc__ or "").strip().partition("\n\n")[2].replace("vit-jax-zoo", "  vit-jax-zoo")
    usage = "usage: vit-jax-zoo <command> [--flag=value ...]"
    print(f"{usage}\n\ncommands:\n{rows}\n\nexamples:\n{examples}")  # noqa: T201
  elif name in COMMANDS:
    sys.argv = [f"vit-jax-zoo {name}", *arguments]
    runpy.run_module(COMMANDS[name][0], run_name="__main__")
  else:
    print(f"error: {unknown_name('command', name, COMMANDS)}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)


if __name__ == "__main__":
  main()
