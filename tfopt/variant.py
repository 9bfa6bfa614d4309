"""A variant is one precision on one runtime with its options; its name is its spec.

`int8(calibration=entropy)@onnxruntime` reads: int8, calibrated by entropy, run by ONNX Runtime.
Options are sorted, and the name parses back to the same variant. `int8(student=width0.5)@litert`
is int8 of a student that was distilled from the model, by the student's name.
"""

from __future__ import annotations

import dataclasses
import re

from tfopt.errors import InputError

Value = bool | int | float | str

STUDENT = "student"  # spelled like an option, and of all precisions

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VALUE = re.compile(r"[A-Za-z0-9_.+-]+")
_SPEC = re.compile(r"(?P<precision>[^()@]+)(?:\((?P<options>[^()]*)\))?@(?P<runtime>[^()@]+)")
_FORM = (
    "expected precision(option=value,…)@runtime, for example int8(per_channel=False)@onnxruntime"
)


@dataclasses.dataclass(frozen=True, order=True)
class Variant:
    """One way of running the model.

    Attributes:
      precision: what happens to the numbers, for example `int8`.
      runtime: what executes, for example `litert`.
      options: sorted (name, value) pairs that differ from the precision's defaults.
      student: name of the student that was distilled from the model; empty for the model itself.
    """

    precision: str
    runtime: str
    options: tuple[tuple[str, Value], ...] = ()
    student: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(sorted(self.options)))

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Reads a variant's name.

        Raises:
          InputError: when the text has another form, or names an option twice.
        """
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise InputError(f"Not a variant: {text!r}; {_FORM}.")
        precision, runtime = match["precision"].strip(), match["runtime"].strip()
        if not _NAME.fullmatch(precision) or not _NAME.fullmatch(runtime):
            raise InputError(f"Not a variant: {text!r}; {_FORM}.")
        options: dict[str, Value] = {}
        student = ""
        for item in (match["options"] or "").split(","):
            if not item.strip():
                continue
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
                raise InputError(f"Not an option: {item.strip()!r} in {text!r}; {_FORM}.")
            if name in options or (name == STUDENT and student):
                raise InputError(f"Option {name!r} stands twice in {text!r}; give it once.")
            if name == STUDENT:
                student = value
            else:
                options[name] = _parse_value(value)
        return cls(precision, runtime, tuple(options.items()), student)

    @property
    def spec(self) -> str:
        """The name without the runtime, for example `int8(per_channel=False)`."""
        given = [*self.options, *([(STUDENT, self.student)] if self.student else [])]
        options = ",".join(f"{name}={value}" for name, value in sorted(given))
        return f"{self.precision}({options})" if options else self.precision

    @property
    def slug(self) -> str:
        """The name as a folder name without parentheses and commas."""
        return re.sub(r"[^A-Za-z0-9_.@=+-]+", "-", str(self)).replace("-@", "@")

    def __str__(self) -> str:
        return f"{self.spec}@{self.runtime}"


def split(text: str) -> list[str]:
    """Splits a comma-separated list of variants or patterns outside parentheses only.

    Raises:
      InputError: when a parenthesis is not closed or not opened.
    """
    items, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth not in (0, 1):
            raise InputError(f"Unbalanced parentheses in {text!r}; {_FORM}.")
        if character == "," and depth == 0:
            items.append(text[start:index])
            start = index + 1
    if depth:
        raise InputError(f"Unbalanced parentheses in {text!r}; {_FORM}.")
    items.append(text[start:])
    return [item.strip() for item in items if item.strip()]


def _parse_value(text: str) -> Value:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if value == value else text  # NaN equals nothing, itself included
    return text
