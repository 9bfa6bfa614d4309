"""Blocks of a model that can be left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tfopt.distillation.narrower import is_maker
from tfopt.distillation.rebuilding import Node, Tensor, graph_of, nodes_of
from tfopt.train.layers import Layer


@dataclasses.dataclass(frozen=True)
class _Block:
    """Calls that leave the shape as it is.

    Attributes:
      kind: equal for blocks that are alike.
      ends: what each tensor that the block makes, by `id`, is replaced by without it.
      start: what it takes.
      end: what it makes.
    """

    kind: tuple[Any, ...]
    ends: dict[int, Tensor]
    start: Tensor
    end: Tensor


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Blocks one after the other; `has_lead` tells of another one before, of other shapes."""

    blocks: list[_Block]
    has_lead: bool


def left_out(model: Layer, depth: float) -> dict[int, Tensor]:
    """What takes the place of blocks so that a part of them stays, as `rebuilt` takes it.

    A block is a residual branch, from the tensor that is added to it to the sum. Where sums follow
    each other in a pattern, such as attention and feed-forward, one repetition is a block. Models
    without residual branches have repeated layers instead: equal ones, one after the other, with
    what lies between. In nested models they are found, too.

    Blocks of the same shape in a row are a stage, to which the layers that bring that shape about
    count as one more block, which always stays. `depth` times the number of all stay, rounded, at
    least one, evenly spread.

    Args:
      model: with a graph.
      depth: factor, above 0 and at most 1.
    """
    nodes = nodes_of(model)
    found: dict[int, Tensor] = {}
    for stage in _residual_stages(nodes) or _repeated_stages(nodes):
        count = len(stage.blocks)
        kept = math.floor(depth * (count + stage.has_lead) + 0.5) - stage.has_lead
        kept = max(kept, 0 if stage.has_lead else 1)
        stays = {math.floor((index + 0.5) * count / kept) for index in range(kept)}
        for index, block in enumerate(stage.blocks):
            if index not in stays:
                found |= block.ends
    nested = {id(node.layer): node.layer for node in nodes if graph_of(node.layer) is not None}
    for layer in nested.values():
        found |= left_out(layer, depth)
    return found


def _residual_stages(nodes: Sequence[Node]) -> list[_Stage]:
    makers = {id(tensor): node for node in nodes for tensor in node.outputs}
    consumers = _consumers(nodes)
    blocks: list[_Block] = []
    sums: set[int] = set()
    for node in nodes:
        found = _branch(node, nodes) if _is_sum(node) else None
        if found is None:
            continue
        start, branch = found
        inside = {id(tensor) for each in branch for tensor in each.outputs}
        is_whole = any(_has_sizes(each.layer) for each in branch)
        if is_whole and not sums & inside:
            sums.add(id(node.outputs[0]))
            ends, end = {id(node.outputs[0]): start}, node.outputs[0]
            after = consumers.get(id(end), [])
            before = makers.get(id(start))
            if len(after) == 1 and before is not None and _is_same(before, after[0]):
                end = after[0].outputs[0]
                ends = {id(end): start}
            kind = tuple(type(each.layer).__name__ for each in branch)
            blocks.append(_Block(kind, ends, start, end))
    rows: list[list[_Block]] = []
    for block in blocks:
        origin = _origin(block.start, makers, {id(row[-1].end): row for row in rows})
        if isinstance(origin, list):
            origin.append(block)
        else:
            rows.append([block])
    return [_Stage(_repetitions(row), _num_before(row[0].start, nodes) > 1) for row in rows]


def _branch(node: Node, nodes: Sequence[Node]) -> tuple[Tensor, list[Node]] | None:
    """The tensor that a sum adds to what is made of it, and the calls that make it."""
    for start, end in (node.inputs, node.inputs[::-1]):
        reached, between = {id(start)}, []
        for each in nodes:
            if each is node:
                break
            if any(id(tensor) in reached for tensor in each.inputs):
                reached |= set(map(id, each.outputs))
                between.append(each)
        if id(end) in reached and end is not start:
            return start, _leading_to(end, between)
    return None


def _leading_to(end: Tensor, nodes: Sequence[Node]) -> list[Node]:
    wanted, found = {id(end)}, []
    for node in reversed(nodes):
        if any(id(tensor) in wanted for tensor in node.outputs):
            found.append(node)
            wanted |= set(map(id, node.inputs))
    return found[::-1]


def _num_before(tensor: Tensor, nodes: Sequence[Node]) -> int:
    """How many layers with kernels a tensor is made by."""
    return sum(_has_sizes(node.layer) for node in _leading_to(tensor, nodes))


def _origin(
    tensor: Tensor, makers: Mapping[int, Node], rows: Mapping[int, list[_Block]]
) -> list[_Block] | None:
    """The row of blocks whose last one a tensor comes from, through layers without kernels."""
    while id(tensor) not in rows:
        node = makers.get(id(tensor))
        is_passed = node is not None and len(node.inputs) == 1 and not _has_sizes(node.layer)
        if node is None or not is_passed or _shape(node.inputs[0]) != _shape(tensor):
            return None
        tensor = node.inputs[0]
    return rows[id(tensor)]


def _repetitions(row: Sequence[_Block]) -> list[_Block]:
    """Joins the blocks of each repetition of the shortest pattern; without one, they stay apart.

    Blocks that are all of different kinds are one repetition.
    """
    kinds = [block.kind for block in row]
    lengths = range(1, len(row) + 1 if len(set(kinds)) == len(kinds) else len(row))
    whole = (
        length
        for length in lengths
        if len(row) % length == 0 and kinds == kinds[:length] * (len(row) // length)
    )
    length = next(whole, 1)
    parts = [row[index : index + length] for index in range(0, len(row), length)]
    return [
        _Block(
            sum((block.kind for block in part), ()),
            {key: tensor for block in part for key, tensor in block.ends.items()},
            part[0].start,
            part[-1].end,
        )
        for part in parts
    ]


def _repeated_stages(nodes: Sequence[Node]) -> list[_Stage]:
    consumers = _consumers(nodes)
    stages: list[_Stage] = []
    last: _Block | None = None
    for node in nodes:
        if len(node.inputs) != 1 or len(node.outputs) != 1 or not _has_sizes(node.layer):
            continue
        tail = [node]
        while True:
            after = consumers.get(id(tail[-1].outputs[0]), [])
            if len(after) != 1 or len(after[0].inputs) != 1 or _has_sizes(after[0].layer):
                break
            if len(after[0].outputs) != 1 or _shape(after[0].outputs[0]) != _shape(node.outputs[0]):
                break
            tail.append(after[0])
        start, end = node.inputs[0], tail[-1].outputs[0]
        block = _Block(tuple(map(_description, tail)), {id(end): start}, start, end)
        follows = last is not None and last.end is start and last.kind == block.kind
        if _shape(start) == _shape(end):
            if follows and stages and stages[-1].blocks[-1] is last:
                stages[-1].blocks.append(block)
            else:
                stages.append(_Stage([block], follows))
        last = block
    return [stage for stage in stages if len(stage.blocks) + stage.has_lead > 1]


def _consumers(nodes: Sequence[Node]) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = {}
    for node in nodes:
        for key in {id(tensor) for tensor in node.inputs}:
            found.setdefault(key, []).append(node)
    return found


def _is_sum(node: Node) -> bool:
    layer = node.layer
    name = type(layer).__name__
    if name in ("TFOpLambda", "TensorFlowOpLayer"):
        name = str(layer.get_config().get("function", "")).rpartition(".")[2].title()
    if name != "Add" or len(node.inputs) != 2:
        return False
    return all(_shape(tensor) == _shape(node.outputs[0]) for tensor in node.inputs)


def _is_same(one: Node, other: Node) -> bool:
    """Whether two calls are of layers that do the same and have no kernels, as a ReLU."""
    is_plain = len(other.inputs) == 1 and not _has_sizes(other.layer)
    return is_plain and _description(one) == _description(other)


def _description(node: Node) -> tuple[str, str]:
    config = dict(node.layer.get_config())
    config.pop("name", None)
    return type(node.layer).__name__, _without_names(config)


def _without_names(config: Any) -> str:
    if isinstance(config, dict):
        items = sorted(config.items(), key=lambda item: str(item[0]))
        return str([(key, _without_names(value)) for key, value in items if key != "name"])
    if isinstance(config, (list, tuple)):
        return str([_without_names(item) for item in config])
    return str(config)


def _has_sizes(layer: Layer) -> bool:
    """Whether a layer multiplies by a kernel, or is a model: those that make a block worth it."""
    return (
        graph_of(layer) is not None
        or is_maker(layer)
        or any(len(weight.shape) > 1 for weight in getattr(layer, "weights", ()))
    )


def _shape(tensor: Tensor) -> tuple[int | None, ...]:
    return tuple(tensor.shape)
