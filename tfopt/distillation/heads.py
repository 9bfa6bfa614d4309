"""Outputs of a model by name, and which of a teacher's outputs teaches which of a student's."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfopt.errors import InputError


@dataclasses.dataclass(frozen=True)
class Heads:
    """The outputs of a model.

    Attributes:
      names: of all outputs, in the order in which `tf.nest` flattens them.
      shapes: of one example, by name.
      is_ordered: whether their order is the model's own, as that of a list is.
    """

    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int | None, ...]]
    is_ordered: bool

    @classmethod
    def of(cls, outputs: Any, layer_names: Sequence[str] | None = None) -> Heads:
        """The heads of a model that has just run.

        Keys name the outputs of a dictionary, as in Keras's `compile` and `fit`; those of a list
        have the names of their layers, or numbers if these are unknown.

        Args:
          outputs: what the model returned, in any structure.
          layer_names: `output_names` of a Keras model, if it has some.
        """
        found = by_name(outputs, layer_names)
        shapes = {
            name: (None,) if output.shape.rank is None else tuple(output.shape[1:])
            for name, output in found.items()
        }
        return cls(tuple(found), shapes, not isinstance(outputs, Mapping))

    @property
    def in_order(self) -> tuple[str, ...]:
        """Names in the model's own order, or by their numbers: `output_2` before `output_10`."""
        return self.names if self.is_ordered else tuple(sorted(self.names, key=_natural))

    def only(self, names: Iterable[str]) -> Heads:
        """Some of the heads."""
        return dataclasses.replace(self, names=tuple(n for n in self.names if n in set(names)))

    def has_named(self, name: str) -> bool:
        """Whether there is an output of that name, which somebody gave it."""
        return name in self.names and not (self.is_ordered and is_default(name))


def by_name(outputs: Any, layer_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Outputs as `Heads` names them, in the order in which `tf.nest` flattens them."""
    import tensorflow as tf

    found = _paths(outputs)
    if isinstance(outputs, Mapping):
        return found
    names = list(layer_names or ())
    if len(names) != len(found) or len(set(names)) != len(names):
        names = [f"output_{path or 0}" for path in found]
    return dict(zip(names, tf.nest.flatten(outputs), strict=True))


def packed(outputs: Any, values: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Values by name in the structure of outputs; None where there is none."""
    import tensorflow as tf

    return tf.nest.pack_sequence_as(outputs, [values.get(name) for name in names])


def given(values: Any, names: Sequence[str], what: str) -> dict[str, Any]:
    """Labels, losses or the like by the names of outputs, without those that are None.

    A list is in the order of the names, which for a dictionary of outputs is that of its sorted
    keys, as in Keras.

    Args:
      values: by name, in a list, or for the only output.
      names: of all outputs.
      what: is given, in the plural, for messages.

    Raises:
      InputError: for other names or another number.
    """
    if values is None:
        return {}
    if isinstance(values, Mapping):
        found = _paths(values)
        for name in found:
            if name not in names:
                near = difflib.get_close_matches(name, names, 3, 0.3) or names
                raise InputError(
                    f"The student has no output {name!r}, which {what} are given for; expected one "
                    f"of {', '.join(near)}."
                )
    elif isinstance(values, (list, tuple)):
        if len(values) != len(names):
            raise InputError(
                f"There are {what} for {len(values)} outputs and the student has {len(names)}; "
                f"expected a dictionary with some of {', '.join(names)}, or a list with one of "
                "each, None where there is none."
            )
        found = dict(zip(names, values, strict=True))
    elif len(names) > 1:
        raise InputError(
            f"The {what} are one array and the student has {len(names)} outputs; expected a "
            f"dictionary with some of {', '.join(names)}."
        )
    else:
        found = {names[0]: values}
    return {name: value for name, value in found.items() if value is not None}


def pair(
    student: Heads, teacher: Heads, name: str, chosen: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The name of the teacher's output for each of the student's.

    Equal names belong together. Names that Keras or a file format gives, such as `dense_3` and
    `output_10`, only stand for a place in an order. What names leave open, shapes decide where
    they leave one way, and else the order if both models have one.

    Args:
      student: its heads.
      teacher: its heads.
      name: of the teacher.
      chosen: the teacher's output by the student's, as far as somebody gave them.

    Raises:
      InputError: when there is no such output, not enough of them, or they cannot be paired.
    """
    found = _chosen(student, teacher, name, chosen or {})
    numbered = is_numbering(student.names) and is_numbering(teacher.names)
    if not found and _is_same(student, teacher, numbered):
        return {own: own for own in student.names}
    if not numbered:
        taken = set(found.values())
        for own in student.names:
            is_free = own not in found and own not in taken
            if is_free and student.has_named(own) and teacher.has_named(own):
                found[own] = own
    mine = [own for own in student.in_order if own not in found]
    theirs = [other for other in teacher.in_order if other not in set(found.values())]
    if not mine:
        return found
    if len(mine) != len(theirs):
        raise InputError(
            f"{name} has {len(teacher.names)} outputs and the student {len(student.names)} "
            f"({', '.join(student.names)}); expected as many: "
            f"{_hint(mine, teacher.names)}."
        )
    by_shape = _by_shape(student, teacher, mine, theirs)
    if by_shape is None:
        says_order = is_numbering(mine) or is_numbering(theirs)
        if not (_has_order(student, mine) and _has_order(teacher, theirs) and says_order):
            raise InputError(
                f"Neither names nor shapes match the outputs of {name} ({', '.join(theirs)}) to "
                f"the student's ({', '.join(mine)}); give both the same names, or "
                f"{_hint(mine, theirs)}."
            )
        by_shape = dict(zip(mine, theirs, strict=True))
    return found | by_shape


def is_numbering(names: Sequence[str]) -> bool:
    """Whether names only give an order: defaults of Keras, or one word with numbers."""
    return all(map(is_default, names)) or len({_stem(name) for name in names}) == 1


def is_default(name: str) -> bool:
    """Whether Keras or a file format gives such names by itself, as in `dense_3`."""
    return _stem(name) in _default_stems()


@functools.cache
def _default_stems() -> frozenset[str]:
    import keras

    layers = [name for name in dir(keras.layers) if name[:1].isupper()]
    # As Keras makes names of classes: Conv2D is conv2d, LayerNormalization layer_normalization.
    found = {re.sub(r"(?<=[a-z])([A-Z])", r"_\1", name).lower() for name in layers}
    return frozenset(found | {"output", "identity", "statefulpartitionedcall", "functional"})


def _stem(name: str) -> str:
    return re.sub(r"[_:]?\d+$", "", re.sub(r":0$", "", name)).lower()


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _is_same(student: Heads, teacher: Heads, numbered: bool) -> bool:
    """Whether the same names mean the same outputs."""
    if set(student.names) != set(teacher.names):
        return False
    if not numbered:
        return True
    is_in_order = student.in_order == teacher.in_order
    is_either_way = not (student.is_ordered and teacher.is_ordered)
    return (is_in_order or is_either_way) and student.shapes == teacher.shapes


def _has_order(heads: Heads, names: Sequence[str]) -> bool:
    return heads.is_ordered or is_numbering(names)


def _by_shape(
    student: Heads, teacher: Heads, mine: Sequence[str], theirs: Sequence[str]
) -> dict[str, str] | None:
    """The pairing if shapes leave only one."""
    found = {}
    for own in mine:
        fitting = [other for other in theirs if teacher.shapes[other] == student.shapes[own]]
        if len(fitting) != 1:
            return None
        found[own] = fitting[0]
    return found if len(set(found.values())) == len(mine) else None


def _chosen(student: Heads, teacher: Heads, name: str, chosen: Mapping[str, str]) -> dict[str, str]:
    for own, other in chosen.items():
        for key, known, whose in (
            (own, student.names, "The student"), (other, teacher.names, name)
        ):  # fmt: skip
            if key not in known:
                near = difflib.get_close_matches(key, known, 3, 0.3) or known
                raise InputError(
                    f"{whose} has no output {key!r}; expected one of {', '.join(near)}."
                )
    return dict(chosen)


def _hint(mine: Sequence[str], theirs: Sequence[str]) -> str:
    return f"pair them in Teacher(…, outputs={{{mine[0]!r}: {theirs[0]!r}, …}})"


def _paths(structure: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by their keys and places, joined by slashes; dictionaries by sorted keys."""
    if isinstance(structure, Mapping):
        items = [(str(key), structure[key]) for key in sorted(structure)]
    elif isinstance(structure, (list, tuple)):
        items = [(str(place), value) for place, value in enumerate(structure)]
    else:
        return {prefix: structure}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _paths(value, f"{prefix}/{key}" if prefix else key)
    return found
