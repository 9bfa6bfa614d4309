"""What TF-TRT made of a SavedModel: read from its files, nothing of it is run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENGINE = "TRTEngineOp"
ASSET_PREFIX = "trt-serialized-engine."
# What stands in every graph and computes nothing.
NOT_COUNTED = frozenset(["Const", "Placeholder", "NoOp", "Identity", "IdentityN"])
# Of a SavedModel's functions that only hand calls on, and of loading engines.
_CALLS = frozenset(
    ["PartitionedCall", "StatefulPartitionedCall", "CreateTRTResourceHandle",
     "InitializeTRTResource", "DestroyResourceOp", "StaticRegexFullMatch", "Select",
     "ShardedFilename", "SaveV2", "RestoreV2", "MergeV2Checkpoints", "StringJoin"]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Segment:
    """One part of the graph that went to TensorRT.

    Attributes:
      name: of its `TRTEngineOp`.
      num_nodes: operations inside, constants and the like not counted.
      num_engines: how many were built and saved; none means that TensorFlow computes it.
      num_bytes: of those engines.
      has_ranges: whether it holds ranges from calibration.
      mode: the precision it is built in: `FP32`, `FP16` or `INT8`; empty where it is not told.
    """

    name: str
    num_nodes: int
    num_engines: int
    num_bytes: int
    has_ranges: bool = False
    mode: str = ""


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted SavedModel.

    Attributes:
      segments: what went to TensorRT.
      left: (name, kind) of the operations that stayed in TensorFlow.
    """

    segments: tuple[Segment, ...]
    left: tuple[tuple[str, str], ...]

    @property
    def num_engines(self) -> int:
        """Engines of all segments."""
        return sum(segment.num_engines for segment in self.segments)

    @property
    def share_inside(self) -> float:
        """Share of the operations that run in engines, 0…1."""
        inside = sum(segment.num_nodes for segment in self.segments if segment.num_engines)
        total = sum(segment.num_nodes for segment in self.segments) + len(self.left)
        return inside / total if total else 0.0

    def describe(self, reasons: dict[str, list[str]]) -> str:
        """One sentence for the user.

        Args:
          reasons: why operations of a kind stayed in TensorFlow, as `read_reasons` gives them.
        """
        num = self.num_engines
        text = (
            f"{num} TensorRT {'engine holds' if num == 1 else 'engines hold'} "
            f"{self.share_inside:.0%} of the operations"
        )
        if not self.left:
            return f"{text}."
        left = [
            f"{count} {op}{f' ({reasons[op][0]})' if reasons.get(op) else ''}"
            for op, count in Counter(op for _, op in sorted(self.left)).most_common()
        ]
        return f"{text}; in TensorFlow stayed {', '.join(left)}."


def read(folder: Path) -> Converted:
    """Reads a SavedModel that TF-TRT wrote."""
    segments: dict[str, Segment] = {}
    left: list[tuple[str, str]] = []
    bodies: dict[str, Any] = {}
    for meta_graph in saved_model(folder).meta_graphs:
        bodies |= {f.signature.name: f.node_def for f in meta_graph.graph_def.library.function}
    # A segment's own operations are in a function that its engine names.
    native = {node.attr["segment_func"].func.name for node in engine_nodes(folder)}
    for name, nodes in bodies.items():
        if name in native:
            continue
        has_engine = any(node.op == ENGINE for node in nodes)
        for node in nodes:
            if node.op == ENGINE:
                key = node.name.rsplit("/", 1)[-1]
                inside = bodies.get(node.attr["segment_func"].func.name, ())
                file = folder / "assets" / f"{ASSET_PREFIX}{key}"
                records = list(record_sizes(file)) if file.is_file() else []
                segments[key] = Segment(
                    key,
                    sum(n.op not in NOT_COUNTED for n in inside),
                    len(records),
                    sum(records),
                    has_ranges="calibration_data" in node.attr
                    and bool(node.attr["calibration_data"].s),
                    mode=node.attr["precision_mode"].s.decode(),
                )
            elif has_engine and node.op not in NOT_COUNTED | _CALLS:
                left.append((node.name, node.op))
    return Converted(tuple(segments.values()), tuple(left))


def engine_nodes(folder: Path, model: Any = None) -> Iterator[Any]:
    """Every `TRTEngineOp` of a SavedModel, in its graph and in its function library."""
    for meta_graph in (model or saved_model(folder)).meta_graphs:
        yield from (node for node in meta_graph.graph_def.node if node.op == ENGINE)
        for function in meta_graph.graph_def.library.function:
            yield from (node for node in function.node_def if node.op == ENGINE)


def engine_files(folder: Path) -> list[Path]:
    """The files with engines, one a segment."""
    return sorted((folder / "assets").glob(f"{ASSET_PREFIX}*"))


def saved_model(folder: Path) -> Any:
    """The parsed `saved_model.pb`."""
    from tensorflow.core.protobuf import saved_model_pb2

    return saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())


def record_sizes(file: Path) -> Iterator[int]:
    """Bytes of each record of a TFRecord file.

    A record is its length (8 bytes), a checksum (4), the data and a checksum (4).
    """
    with file.open("rb") as stream:
        while head := stream.read(12):
            size = int.from_bytes(head[:8], "little")
            yield size
            stream.seek(size + 4, 1)


def read_reasons(file: Path) -> dict[str, list[str]]:
    """Why operations stayed in TensorFlow, by their kind, the most frequent reason first.

    Args:
      file: what TF-TRT writes where TF_TRT_SHOW_DETAILED_REPORT names a file: a row for each
        operation and reason, with how often, separated by bars.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    rows = file.read_text().splitlines()[1:] if file.is_file() else []
    for op, *reason, count in (row.split("|") for row in rows if row.count("|") >= 2):
        if count.strip().isdigit():
            text = " ".join("|".join(reason).split()).rstrip(".")
            found.setdefault(op.strip(), []).append((int(count), text))
    return {op: [text for _, text in sorted(rows, reverse=True)] for op, rows in found.items()}
