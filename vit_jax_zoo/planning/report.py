"""Formats plans as text: the report of one plan, and a table to compare meshes."""

from collections.abc import Sequence

from vit_jax_zoo.planning.plan import Plan

ASSUMPTIONS = (
  "a step takes the longest of compute, memory traffic and network traffic, each at the chip's "
  "stated peak and fully overlapped",
  "collectives are rings over all links of a chip; per device, they send (n-1)/n of an array, and "
  "twice that for an all-reduce",
  "FLOPs (matrix products and convolutions) are counted from the jaxpr, traffic from the compiled "
  "program, both with all loop iterations and recomputation (remat)",
  "evaluation, checkpoints and input are not included",
)


def report(plan: Plan) -> str:
  """Returns all figures of a plan, one per line, and its assumptions."""
  memory = plan.memory
  shapes = ["x".join(map(str, shape)) for _, shape in plan.batch_shapes]
  several = " (the largest is compiled)" if len(shapes) > 1 else ""
  rows = [
    ("config", " ".join((plan.config, *plan.overrides))),
    ("machine", f"{plan.machine}: {plan.num_devices} x {plan.device_kind}, mesh {mesh(plan)}"),
    (
      "batch",
      f"{plan.batch_size} of {', '.join(shapes)}{several}, {plan.accumulation_steps} "
      "micro-batch(es)",
    ),
    ("remat", plan.remat or "-"),
    ("fits", _verdict(plan)),
    ("  parameters", gib(memory.params)),
    ("  optimizer state", gib(memory.optimizer)),
    ("  other state", gib(memory.other_state)),
    ("  batch", gib(memory.batch)),
    ("  activations", f"{gib(memory.activations)} for the backward pass, before fusion by XLA"),
    ("  temporaries", f"{gib(memory.temporary)}, including activations and gradients"),
    ("  program", gib(memory.code)),
    ("FLOPs", _count(plan.flops, "FLOP")),
    *_traffic_rows(plan),
    *_time_rows(plan),
  ]
  width = max(len(name) for name, _ in rows)
  lines = [f"{name:<{width}}  {text}" for name, text in rows]
  notes = [*plan.notes, *(ASSUMPTIONS if plan.roofline else ())]
  if notes:
    lines += ["", "Per device and step, assuming:", *(f"  * {note}" for note in notes)]
  return "\n".join(lines)


def table(plans: Sequence[Plan]) -> str:
  """Returns one line for each plan, to compare meshes."""
  head = f"{'mesh':<28} {'remat':<10} {'fits':<4} {'peak':>10} {'min step time':>13}  bound by"
  rows = [
    f"{mesh(p):<28} {p.remat or '-':<10} {'yes' if p.fits else 'no':<4} "
    f"{gib(p.memory.peak):>10} {seconds(p.step_seconds):>13}  "
    f"{p.roofline.bound if p.roofline else '-'}"
    for p in plans
  ]
  return "\n".join([head, *rows])


def mesh(plan: Plan) -> str:
  """Returns the sizes of the mesh's axes with more than one device."""
  used = [f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1]
  return " x ".join(used) or "one device"


def gib(size: float | None) -> str:
  """Formats a number of bytes.

  >>> gib(1.5 * 2**30), gib(3 * 2**20), gib(None)
  ('1.50 GiB', '3.0 MiB', '-')
  """
  if size is None:
    return "-"
  return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def seconds(value: float | None) -> str:
  """Formats a time in seconds.

  >>> seconds(0.0123), seconds(2.5), seconds(None)
  ('12.3 ms', '2.50 s', '-')
  """
  if value is None:
    return "-"
  return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _verdict(plan: Plan) -> str:
  memory = plan.memory
  if memory.peak is None:
    return "no: the compiler ran out of memory"
  if memory.limit is None:
    return f"unknown: peak {gib(memory.peak)}; the device does not report its memory"
  return f"{'yes' if plan.fits else 'NO'}: {gib(memory.peak)} of {gib(memory.limit)}"


def _count(value: float, unit: str) -> str:
  for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
    if value >= size:
      return f"{value / size:.2f} {prefix}{unit}"
  return f"{value:.0f} {unit}"


def _thousands(value: float | None) -> str:
  return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(days: float | None) -> str:
  if days is None:
    return "-"
  return f"{_thousands(days)} days" if days >= 2 else f"{24 * days:.3g} hours"


def _traffic_rows(plan: Plan) -> list[tuple[str, str]]:
  if plan.memory_bytes is None or plan.network_bytes is None:
    return []
  kinds = [f"{kind} {_count(sent, 'B')}" for kind, sent in sorted(plan.network_bytes.items())]
  total = _count(sum(plan.network_bytes.values()), "B")
  return [
    ("memory traffic", _count(plan.memory_bytes, "B")),
    ("network traffic", f"{total} ({', '.join(kinds)})" if kinds else "none"),
    ("compile time", f"{plan.compile_seconds:.0f} s ({plan.compile_cpu_seconds:.0f} CPU s)"),
  ]


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
  least = plan.roofline
  if least is None or plan.step_seconds is None:
    return [("min step time", "unknown: no peak rates of this device")] if plan.fits else []
  parts = ", ".join(f"{p} {seconds(getattr(least, p))}" for p in ("compute", "memory", "network"))
  rows = [("min step time", f"{seconds(least.step)} ({parts})")]
  if plan.step_seconds != least.step:
    rows.append(("mean step time", seconds(plan.step_seconds)))
  return [
    *rows,
    ("max rate", f"{_thousands(plan.epochs_per_day)} epochs a day"),
    ("min total time", f"{_duration(plan.days)} in total ({plan.num_steps:,} steps)"),
  ]
