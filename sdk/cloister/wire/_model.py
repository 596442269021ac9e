"""The kinds of wire model, the names and numbers that all of them use, and how a value that does not fit is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cloister.wire._errors import InvalidArgument

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

__all__ = ["Body", "Count", "Identifier", "Name", "PositiveFloat", "Probability", "Request", "Response", "in_words"]

_NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,62}$"
_IDENTIFIER = r"^[a-z]{2,4}_[0-9a-f]{32}$"

Name = Annotated[str, StringConstraints(pattern=_NAME)]
"""A name that people give: a letter first, then letters, digits, `_` and `-`; at most 63 characters."""

Identifier = Annotated[str, StringConstraints(pattern=_IDENTIFIER)]
"""An immutable id that the server gives, `ds_5f…`: its prefix tells the kind of thing."""

Count = Annotated[int, Field(ge=1, le=2**40)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]

_PATTERNS = {
    _NAME: "is no name: a letter first, then letters, digits, _ and -; at most 63 characters, and no blanks",
    _IDENTIFIER: "is no id as the server gives them; give the thing itself, its id or its name",
}
_WORDS = {
    "string_type": "must be text, in quotes",
    "missing": "must be given",
    "extra_forbidden": "is not known here; check how it is spelled",
    "tuple_type": "must be several values in brackets, as (3, 3)",
    "model_type": "is of another kind; give an object of this SDK",
    "model_attributes_type": "is of another kind; give an object of this SDK",
    "union_tag_not_found": "is no layer or object of this SDK; make it by its class, as layers.Linear(...)",
    "union_tag_invalid": "is no layer or object that is known here; a layer of PyTorch comes in by from_torch",
}
_PUBLIC_NAMES = {"Privacy": "DP"}


class _InWords(ModelMetaclass):
    """Makes a constructor's refusal an InvalidArgument. Reading from the wire stays pydantic's own, errors and all."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:  # noqa: N805 (of a metaclass)
        name = _PUBLIC_NAMES.get(cls.__name__, cls.__name__.removesuffix("Column"))
        if args:
            raise InvalidArgument(
                f"{name} takes its fields by name: {name}({', '.join(f'{each}=...' for each in vars(cls)['__pydantic_fields__'])})"
            )
        try:
            return super().__call__(**fields)
        except ValidationError as error:
            words = in_words(error)
        raise InvalidArgument(f"{name}: {words}")


class Body(BaseModel):
    """What a caller sends: frozen, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Request(Body, metaclass=_InWords):
    """A part of a body that people construct themselves. Raises InvalidArgument, in words, where it does not fit."""


class Response(BaseModel):
    """What a server answers: frozen, and an unknown field is ignored, so that old clients survive new servers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def in_words(error: ValidationError) -> str:
    """Each field that is wrong and why, and never its value."""
    found = error.errors(include_input=False, include_url=False)
    places = [each["loc"] for each in found]
    told = [
        f"{_place(each['loc'])}{_problem(each)}"
        for each in found
        # A collection 'has too few items' also where its items are wrong, and then only they are worth telling.
        if not (
            each["type"] == "too_short"
            and any(p[: len(each["loc"])] == each["loc"] for p in places if p != each["loc"])
        )
    ]
    return "; ".join(told)


def _place(loc: tuple[int | str, ...]) -> str:
    named = ".".join(str(part) for part in loc if part != "[key]")
    return f"{named}: " if named else ""


def _problem(each: Any) -> str:
    if each["type"] == "string_pattern_mismatch":
        return _PATTERNS.get(each["ctx"]["pattern"], str(each["msg"]))
    return _WORDS.get(each["type"], str(each["msg"]).removeprefix("Value error, "))
