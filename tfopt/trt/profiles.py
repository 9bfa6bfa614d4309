"""Optimization profiles: for which input shapes an engine is built.

A profile gives each input a minimum, an optimum and a maximum shape. TensorRT chooses kernels that
are fast at the optimum and correct from minimum to maximum
(https://docs.nvidia.com/deeplearning/tensorrt, "Working with Dynamic Shapes").
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tfopt.errors import ConversionError, InputError

if TYPE_CHECKING:
    from tfopt.runtimes.base import Arrays
    from tfopt.signature import Signature

Shape = tuple[int, ...]
ENDS = ("minimum", "optimum", "maximum")

_SHAPE = re.compile(r"\d+(x\d+)*")
_FORM = "expected input:AxBxC, several separated by commas, for example image:1x224x224x3"


@dataclasses.dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input.

    Attributes:
      minimum: the smallest that is accepted, in each dimension.
      optimum: the one that kernels are chosen for.
      maximum: the largest that is accepted.
    """

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __post_init__(self) -> None:
        ranks = {len(self.minimum), len(self.optimum), len(self.maximum)}
        ordered = zip(self.minimum, self.optimum, self.maximum, strict=False)
        if len(ranks) > 1 or not all(0 < low <= best <= high for low, best, high in ordered):
            raise InputError(
                f"Not a range of shapes: {spell(self.minimum)}, {spell(self.optimum)}, "
                f"{spell(self.maximum)}; expected minimum, optimum and maximum of one rank, none "
                "smaller than the one before."
            )

    @property
    def is_fixed(self) -> bool:
        """Whether there is one shape only."""
        return self.minimum == self.maximum

    def accepts(self, shape: Shape) -> bool:
        """Whether the shape lies between minimum and maximum."""
        return len(shape) == len(self.minimum) and all(
            low <= size <= high
            for low, size, high in zip(self.minimum, shape, self.maximum, strict=True)
        )

    def __str__(self) -> str:
        if self.is_fixed:
            return spell(self.optimum)
        return f"{spell(self.minimum)} to {spell(self.maximum)}, best at {spell(self.optimum)}"


@dataclasses.dataclass(frozen=True)
class Profile:
    """The shapes of every input, by its name in the signature."""

    inputs: Mapping[str, ShapeRange]

    @property
    def is_fixed(self) -> bool:
        """Whether each input has one shape only."""
        return all(shapes.is_fixed for shapes in self.inputs.values())

    @property
    def batch_size(self) -> int:
        """The first dimension of the best shape, of the first input that has one."""
        optima = (shapes.optimum for _, shapes in sorted(self.inputs.items()))
        return next((shape[0] for shape in optima if shape), 1)

    @classmethod
    def fixed(cls, signature: Signature, batch_size: int) -> Profile | None:
        """One shape, for models whose inputs are free in the batch size at most.

        Returns:
          None where the signature leaves another dimension free.
        """
        shapes = {}
        for spec in signature.with_batch_size(batch_size).inputs:
            if spec.shape is None or None in spec.shape:
                return None
            shape = tuple(size for size in spec.shape if size is not None)
            shapes[spec.name] = ShapeRange(shape, shape, shape)
        return cls(shapes)

    @classmethod
    def of_data(
        cls,
        signature: Signature,
        batches: Iterable[Arrays],
        batch_size: int,
        max_batch_size: int,
    ) -> Profile:
        """The shapes that examples have: batches from 1 on, other dimensions as they were seen.

        Args:
          signature: of the model.
          batches: examples; the most frequent shape is the optimum.
          batch_size: the optimum of the first dimension, where that is free.
          max_batch_size: its maximum.

        Raises:
          ConversionError: when a dimension besides the batch is free and there are no examples, or
            they are of different ranks.
        """
        if (profile := cls.fixed(signature, batch_size)) is not None:
            seen = {name: [shapes.optimum] for name, shapes in profile.inputs.items()}
        else:
            seen = {spec.name: [] for spec in signature.inputs}
            for batch in batches:
                for name, values in batch.items():
                    seen[name].append(tuple(values.shape))
        found = {}
        for spec in signature.inputs:
            shapes = seen[spec.name]
            if not shapes:
                raise ConversionError(
                    f"Input {spec} has free dimensions and there are no examples to take their "
                    "sizes from; give `data`, or the shapes (`min_shapes`, `opt_shapes`, "
                    "`max_shapes`)."
                )
            if len({len(shape) for shape in shapes}) > 1:
                raise ConversionError(
                    f"Input {spec} has examples of different ranks, which no engine is for; give "
                    "the shapes (`min_shapes`, `opt_shapes`, `max_shapes`)."
                )
            sizes = list(zip(*shapes, strict=True))
            minimum, maximum = [min(size) for size in sizes], [max(size) for size in sizes]
            optimum = list(Counter(shapes).most_common(1)[0][0])
            if minimum and (spec.shape is None or spec.shape[0] is None):
                minimum[0], optimum[0] = 1, batch_size
                maximum[0] = max(batch_size, max_batch_size)
            found[spec.name] = ShapeRange(tuple(minimum), tuple(optimum), tuple(maximum))
        return cls(found)

    @classmethod
    def parse(cls, minimum: str, optimum: str, maximum: str) -> Profile:
        """Reads shapes as `trtexec` spells them, such as `image:1x224x224x3,mask:1x224x224`.

        Raises:
          InputError: when one is malformed, or an input is missing in one of the three.
        """
        parts = [_parse(text) for text in (minimum, optimum, maximum)]
        if not parts[0].keys() == parts[1].keys() == parts[2].keys():
            names = "; ".join(", ".join(part) for part in parts)
            raise InputError(
                f"Minimum, optimum and maximum name different inputs ({names}); give each input "
                "in all three."
            )
        return cls({name: ShapeRange(*(part[name] for part in parts)) for name in parts[0]})

    def check(self, signature: Signature) -> None:
        """Checks that the profile is of this signature.

        Raises:
          InputError: when inputs or fixed dimensions differ.
        """
        if set(self.inputs) != set(signature.input_names):
            raise InputError(
                f"The profile is of {', '.join(sorted(self.inputs))}; the model's inputs are "
                f"{', '.join(signature.input_names)}."
            )
        for spec in signature.inputs:
            for end in ENDS:
                shape = getattr(self.inputs[spec.name], end)
                if spec.shape is not None and (
                    len(shape) != len(spec.shape)
                    or any(w not in (None, g) for w, g in zip(spec.shape, shape, strict=True))
                ):
                    raise InputError(
                        f"The profile's {end} of {spec.name} is {spell(shape)}; the model takes "
                        f"{spec}."
                    )

    def outside(self, inputs: Mapping[str, Any]) -> str | None:
        """Which array lies outside the profile, as a sentence; None when all are inside."""
        for name, shapes in self.inputs.items():
            shape = tuple(inputs[name].shape)
            if not shapes.accepts(shape):
                return (
                    f"Input {name} is {spell(shape)} and the engine was built for {shapes}; "
                    "give a shape inside, or convert again with another profile."
                )
        return None

    def spell(self, end: str) -> str:
        """All shapes of one end (`minimum`, `optimum`, `maximum`) as `trtexec` spells them."""
        return ",".join(
            f"{name}:{spell(getattr(shapes, end))}" for name, shapes in sorted(self.inputs.items())
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads."""
        return {name: dataclasses.asdict(shapes) for name, shapes in sorted(self.inputs.items())}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Profile:
        """Reads what `to_json` wrote."""
        return cls(
            {
                name: ShapeRange(*(tuple(shapes[end]) for end in ENDS))
                for name, shapes in value.items()
            }
        )


def spell(shape: Iterable[int]) -> str:
    """A shape as `trtexec` spells it, such as `1x224x224x3`; `scalar` for none."""
    return "x".join(map(str, shape)) or "scalar"


def _parse(text: str) -> dict[str, Shape]:
    found = {}
    for item in text.split(","):
        name, colon, shape = item.strip().rpartition(":")
        if not colon or not name or not _SHAPE.fullmatch(shape):
            raise InputError(f"Not a shape: {item.strip()!r} in {text!r}; {_FORM}.")
        if name in found:
            raise InputError(f"Input {name} stands twice in {text!r}; give it once.")
        found[name] = tuple(int(size) for size in shape.split("x"))
    return found
