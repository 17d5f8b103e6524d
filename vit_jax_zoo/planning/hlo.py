"""Memory and network traffic of a compiled program, from its HLO text.

XLA's cost analysis counts the body of a loop once; here each computation counts as often as it is
executed: a scan's body once per step; of a conditional, the branch with the most traffic.

* An instruction reads its operands and writes its result; a fusion and a Pallas kernel are one
  instruction each, though a kernel may read an operand again for each of its blocks.
* Slices, and updates in place, count as the slice, also within nested fusions and as prefetches.
* Arrays outside main memory (`S(1)` is a TPU's on-chip memory) do not count.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

_SENT: Mapping[str, Callable[[int], float]] = {
  "all-gather": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda _: 1.0,
  "collective-broadcast": lambda _: 1.0,
}
"""Collectives: bytes that each of n devices sends, per byte of its operand."""

_FREE = (
  "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call",
  "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
)  # fmt: skip
"""Instructions without memory traffic."""

_WHOLE = ("broadcast", "iota", "copy-start", "all-gather-start", "collective-permute-start")
"""Instructions of which only the result counts; for the last three it includes the bytes read."""

_SLICES = ("dynamic-slice", "slice", "gather")

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NAME = re.compile(r"%?([\w.-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|called_computations)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=(\S+), false_\w+=(\S+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_MESH = re.compile(r"replica_groups=(?:@?\w+)?mesh\[([^\]]*)\]\s*\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation."""

  name: str  # without "%"
  shape: str  # of the result, as text
  opcode: str
  operands: Sequence[str]  # names of the arguments
  rest: str  # attributes, as text
  is_root: bool  # whether it is the computation's result
  called: Sequence[str]  # computations that run with this instruction, except a loop's condition
  branches: Sequence[str]  # computations of which one runs


@dataclasses.dataclass(frozen=True)
class Module:
  """A parsed program."""

  computations: Mapping[str, Sequence[Instruction]]  # in order, by computation
  entry: str  # name of the entry computation
  num_devices: int


@dataclasses.dataclass
class Traffic:
  """Traffic of one device in one execution; collectives, by kind, as ring algorithms send them."""

  memory_bytes: float = 0.0  # read from and written to main memory
  collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
  loops_of_unknown_length: int = 0  # counted as one iteration

  def add(self, other: "Traffic") -> None:
    """Adds other traffic in place."""
    self.memory_bytes += other.memory_bytes
    self.loops_of_unknown_length += other.loops_of_unknown_length
    for kind, sent in other.collective_bytes.items():
      self.collective_bytes[kind] = self.collective_bytes.get(kind, 0.0) + sent


def traffic(text: str) -> Traffic:
  """Returns the traffic of an optimised HLO module, given as XLA prints it."""
  module = parse(text)
  return _traffic(module, module.entry, 1, fused=False)


def parse(text: str) -> Module:
  """Returns the computations of an HLO module."""
  lines_of: dict[str, list[str]] = {}
  entry, current = None, None
  for line in text.splitlines():
    bare = _STRING.sub("", current[-1]) if current else ""
    if current and bare.count("{") > bare.count("}"):  # a kernel's metadata spans several lines
      current[-1] += line
    elif current is None and line.endswith("{") and "->" in line:
      if name := _NAME.match(line.removeprefix("ENTRY ").strip()):
        current = lines_of[name[1]] = []
        entry = name[1] if line.startswith("ENTRY") else entry
    elif line == "}" or line.startswith("}, execution_thread"):
      current = None
    elif current is not None and line.startswith("  ") and " = " in line:
      current.append(line)
  if entry is None:
    raise ValueError("text: no ENTRY computation; expected an HLO module as XLA prints it")
  partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
  replicas = re.search(r"replica_count=(\d+)", text[:100_000])
  devices = math.prod(int(found[1]) for found in (partitions, replicas) if found)
  computations = {name: [_instruction(line) for line in lines] for name, lines in lines_of.items()}
  return Module(computations, entry, devices)


def _instruction(line: str) -> Instruction:
  left, _, right = line.strip().partition(" = ")
  end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
  shape, right = right[:end], right[end:].lstrip()
  opening = right.index("(")
  closing = _closing(right, opening)
  operands = re.findall(r"%([\w.-]+)", right[opening : closing + 1])
  if right.startswith(("constant", "parameter")):
    operands = [right[opening + 1 : closing]]
  rest = right[closing + 1 :]
  branches = _BRANCHES.search(rest)
  return Instruction(
    name=left.removeprefix("ROOT ").lstrip("%"),
    shape=shape,
    opcode=right[:opening],
    operands=operands,
    rest=rest,
    is_root=left.startswith("ROOT"),
    called=_CALLED.findall(rest),
    branches=_NAME.findall(",".join(filter(None, branches.groups()))) if branches else (),
  )


def _closing(text: str, opening: int) -> int:
  depth = 0
  for i in range(opening, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  raise ValueError(f"HLO: unclosed parenthesis in {text[:60]!r}")


@functools.lru_cache(maxsize=65536)
def shape_bytes(shape: str, *, main_memory: bool = False) -> float:
  """Returns the bytes of all arrays, or those in main memory, of a shape: f32[2,3]{1,0} has 24."""
  total = 0.0
  for kind, sides, layout in _ARRAY.findall(shape):
    if main_memory and re.search(r"S\([1-9]", layout):
      continue
    bits = re.match(r"[a-z]+(\d+)", kind)
    size = int(bits[1]) / 8 if bits else {"pred": 1, "token": 0, "opaque": 0}.get(kind, 0)
    total += size * math.prod(int(side) for side in sides.split(",") if side)
  return total


# Instructions whose computations count on their own; those of others are one instruction.
_RUNNING = ("while", "call", "async-start")


def _traffic(module: Module, name: str, times: int, *, fused: bool) -> Traffic:
  """Returns the traffic of a computation executed `times`; inside a fusion, collectives only."""
  found = Traffic()
  shapes = {i.name: i for i in module.computations.get(name, ())}
  for instruction in shapes.values():
    kind, inner = instruction.opcode.removesuffix("-start"), times
    if not fused:
      found.memory_bytes += times * _moved(module, instruction, shapes)
    if instruction.opcode == "while":
      trips = _trip_count(module, instruction)
      found.loops_of_unknown_length += trips is None
      inner = times * (1 if trips is None else trips)
    if kind in _SENT:
      operands = (shapes[name] for name in instruction.operands if name in shapes)
      size = sum((shape_bytes(operand.shape) for operand in operands), 0.0)
      # A TPU's name for an all-reduce whose result is scattered.
      kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
      sent = size * _SENT[kind](group_size(instruction.rest, module.num_devices))
      found.add(Traffic(0.0, {kind: times * sent}))
    else:
      for called in instruction.called:
        inside = fused or instruction.opcode not in _RUNNING
        found.add(_traffic(module, called, inner, fused=inside))
    if instruction.branches:
      branches = [_traffic(module, each, times, fused=False) for each in instruction.branches]
      found.add(max(branches, key=lambda t: t.memory_bytes + sum(t.collective_bytes.values())))
  return found


def _trip_count(module: Module, loop: Instruction) -> int | None:
  """Returns a loop's number of iterations: XLA's annotation, or from `counter < constant`."""
  if noted := _TRIPS.search(loop.rest):
    return int(noted[1])
  condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
  lines = module.computations.get(condition[1], ()) if condition else ()
  roots = [i for i in lines if i.is_root]
  # The comparison is an instruction of its own, or within a fusion.
  fused = [i for root in roots for name in root.called for i in module.computations.get(name, ())]
  if not any(i.opcode == "compare" and "direction=LT" in i.rest for i in roots + fused):
    return None
  constants = [i for i in lines if i.opcode == "constant" and i.name in roots[0].operands]
  return int(constants[0].operands[0]) if len(constants) == 1 else None


def group_size(attributes: str, num_devices: int) -> int:
  """Returns the number of devices in a collective from its attributes, by default `num_devices`.

  `replica_groups` are [2,4]<=[8], {{0,1},{2,3}}, or mesh['data'=4,'fsdp'=16] {'fsdp'}, for example.
  """
  if mesh := _MESH.search(attributes):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
    parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
    return int(iota[1])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
  return len(listed[1].split(",")) if listed else num_devices


def _moved(module: Module, instruction: Instruction, shapes: Mapping[str, Instruction]) -> float:
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.rest:
    return 0.0
  if opcode == "fusion":
    return _moved_by_fusion(module, instruction, shapes)
  written = shape_bytes(instruction.shape, main_memory=True)
  if opcode in _SLICES:
    is_read = _read(instruction.operands[0], shapes) > 0  # from main memory
    return written + (shape_bytes(instruction.shape) if is_read else 0.0)
  if opcode == "dynamic-update-slice":
    update = shapes[instruction.operands[1]].shape
    return shape_bytes(update, main_memory=True) + (shape_bytes(update) if written else 0.0)
  operands = () if opcode in _WHOLE else instruction.operands
  return written + sum(_read(operand, shapes) for operand in operands)


def _read(name: str, shapes: Mapping[str, Instruction]) -> float:
  return shape_bytes(shapes[name].shape, main_memory=True) if name in shapes else 0.0


def _moved_by_fusion(
  module: Module, fusion: Instruction, shapes: Mapping[str, Instruction]
) -> float:
  operands = enumerate(fusion.operands)
  read = sum(min(_read(o, shapes), _read_within(module, fusion, i)) for i, o in operands)
  written = shape_bytes(fusion.shape, main_memory=True)
  return read + max(0.0, written - sum(_not_written(module, fusion)))


def _read_within(module: Module, fusion: Instruction, position: int) -> float:
  """Returns the bytes that a fusion, and those nested in it, read of an operand; inf: all of it."""
  lines = module.computations.get(fusion.called[0], ()) if fusion.called else ()
  names = {i.name for i in lines if i.opcode == "parameter" and i.operands[0] == str(position)}
  total = 0.0 if names else math.inf
  for line in lines:
    for index in (i for i, operand in enumerate(line.operands) if operand in names):
      if line.opcode == "bitcast" and not line.is_root:
        names.add(line.name)
      elif line.opcode == "fusion":
        total += _read_within(module, line, index)
      elif index == 0 and line.opcode in _SLICES:
        total += shape_bytes(line.shape)
      elif index or line.opcode != "dynamic-update-slice":
        total = math.inf
  return total


def _not_written(module: Module, fusion: Instruction) -> Iterator[float]:
  """Yields the bytes outside the slice for each of a fusion's results that is updated in place."""
  lines = module.computations.get(fusion.called[0], ()) if fusion.called else ()
  by_name = {i.name: i for i in lines}
  roots = [i for i in lines if i.is_root]
  if roots and roots[0].opcode == "tuple":
    roots = [by_name[o] for o in roots[0].operands if o in by_name]
  for root in roots:
    root = by_name[root.operands[0]] if root.opcode in ("bitcast", "copy") else root
    if root.opcode == "fusion":
      yield from _not_written(module, root)
    elif root.opcode == "dynamic-update-slice" and root.operands[1] in by_name:
      yield shape_bytes(root.shape) - shape_bytes(by_name[root.operands[1]].shape)
