"""What goes into a model and what comes out: names, shapes, dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
      name: the name in the signature.
      shape: a dimension that may vary is None; None as a whole when even the rank is unknown.
      dtype: as Keras and NumPy spell it (`float32`, `int64`, `bool`), and `string` for bytes.
      position: its place in the order of the Keras model; None where that is not known.
      aliases: other names that Keras has for it, of a key or a layer.
    """

    name: str
    shape: tuple[int | None, ...] | None
    dtype: str
    position: int | None = dataclasses.field(default=None, compare=False)
    aliases: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __str__(self) -> str:
        if self.shape is None:
            shape = "unknown rank"
        else:
            shape = f"({', '.join('?' if d is None else str(d) for d in self.shape)})"
        return f"{self.name} {self.dtype} {shape}"

    def accepts(self, array: Any) -> bool:
        """Whether an array has this dtype and fits this shape."""
        is_string = array.dtype.kind in "OSU"
        if is_string != (self.dtype == "string") or not (is_string or array.dtype == self.dtype):
            return False
        if self.shape is None:
            return True
        return len(self.shape) == len(array.shape) and all(
            want is None or want == got for want, got in zip(self.shape, array.shape, strict=True)
        )

    def with_batch_size(self, batch_size: int) -> TensorSpec:
        """The same tensor with its first dimension fixed, if it was free."""
        if not self.shape or self.shape[0] is not None:
            return self
        return dataclasses.replace(self, shape=(batch_size, *self.shape[1:]))


def _find(specs: Sequence[TensorSpec], name: str) -> str | None:
    exact = [spec.name for spec in specs if spec.name == name]
    found = exact or [spec.name for spec in specs if name in spec.aliases]
    return found[0] if found else None


def in_order(specs: Sequence[TensorSpec]) -> list[str] | None:
    """Names in the order of the Keras model; None where that is not known."""
    if len(specs) > 1 and any(spec.position is None for spec in specs):
        return None
    return [spec.name for spec in sorted(specs, key=lambda spec: spec.position or 0)]


@dataclasses.dataclass(frozen=True)
class Signature:
    """One callable entry of a model; inputs and outputs are sorted by name.

    Attributes:
      key: the name of the signature in its SavedModel, such as `serving_default`.
      inputs: what `Session.run` takes.
      outputs: what `Session.run` returns.
    """

    key: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, sorted."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, sorted."""
        return tuple(spec.name for spec in self.outputs)

    def input_called(self, name: str) -> str | None:
        """The name of the input that has this name or alias, or None."""
        return _find(self.inputs, name)

    def output_called(self, name: str) -> str | None:
        """The name of the output that has this name or alias, or None."""
        return _find(self.outputs, name)

    @property
    def batch_size(self) -> int | None:
        """The batch size that the model insists on, or None when it takes any."""
        sizes = {spec.shape[0] for spec in self.inputs if spec.shape}
        fixed = {size for size in sizes if size is not None}
        return min(fixed) if fixed and None not in sizes else None

    def with_batch_size(self, batch_size: int) -> Signature:
        """The same signature with free first dimensions fixed."""
        return dataclasses.replace(
            self,
            inputs=tuple(spec.with_batch_size(batch_size) for spec in self.inputs),
            outputs=tuple(spec.with_batch_size(batch_size) for spec in self.outputs),
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Signature:
        """Reads what `to_json` wrote."""

        def specs(items: Iterable[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(
                    item["name"],
                    None if item["shape"] is None else tuple(item["shape"]),
                    item["dtype"],
                    item.get("position"),
                    tuple(item.get("aliases", ())),
                )
                for item in items
            )

        return cls(value["key"], specs(value["inputs"]), specs(value["outputs"]))

    def __str__(self) -> str:
        inputs = ", ".join(map(str, self.inputs))
        outputs = ", ".join(map(str, self.outputs))
        return f"{self.key}: {inputs} -> {outputs}"
