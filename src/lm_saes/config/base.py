"""What every configuration shares: strict fields, data types by name, files, overrides and one-line errors.

A configuration is a plain frozen value. It validates itself, does no I/O and imports no torch: a data type is kept as its canonical
name ("float32") and becomes a `torch.dtype` when the attribute is read.

Merging happens here and nowhere else: defaults < file < overrides (`load_settings`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lm_saes.errors import CREDENTIALS, ConfigError, LmSaesError, did_you_mean
from lm_saes.files import LARGEST_TABLE, parse_json, values_within

if TYPE_CHECKING:
    import torch

_DTYPE_ALIASES = {
    "float": "float32", "fp16": "float16", "fp32": "float32", "fp64": "float64", "half": "float16", "double": "float64",
    "bf16": "bfloat16", "int": "int32", "long": "int64",
}  # fmt: skip
_DTYPES = frozenset({"float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "bool"})
_FLOATING = frozenset({"float16", "float32", "float64", "bfloat16"})


def dtype_name(value: Any) -> str:
    """The canonical name of a data type given as a name (with or without `torch.`) or as a `torch.dtype`."""
    name = str(value).removeprefix("torch.").lower()
    name = _DTYPE_ALIASES.get(name, name)
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {value!r}{did_you_mean(name, _DTYPES | _DTYPE_ALIASES.keys())} Known: {', '.join(sorted(_DTYPES))}")
    return name


def floating_dtype_name(value: Any) -> str:
    """`dtype_name`, of a type that weights can have."""
    name = dtype_name(value)
    if name not in _FLOATING:
        raise ValueError(f"weights and activations are floating-point numbers: {', '.join(sorted(_FLOATING))}; got {value!r}")
    return name


class _DType:
    """Marks a field whose stored value is a canonical name and whose attribute is a `torch.dtype`."""


if TYPE_CHECKING:
    DType = torch.dtype | str
    FloatingOrNone = torch.dtype | str | None
    OptionalDType = torch.dtype | str | None
else:
    DType = Annotated[str, BeforeValidator(floating_dtype_name), _DType()]
    FloatingOrNone = Annotated[str | None, BeforeValidator(lambda value: None if value is None else floating_dtype_name(value)), _DType()]
    OptionalDType = Annotated[str | None, BeforeValidator(lambda value: None if value is None else dtype_name(value)), _DType()]

Steps = Annotated[int | float, Field(ge=0)]
"""A number of steps: an int counts steps, a float in [0, 1] is a fraction of the run."""

PathString = Annotated[str, Field(min_length=1), BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A path kept as text, so that configurations stay plain values; `pathlib.Path` is accepted. Not empty: the present folder is `.`."""


def _parts(annotation: Any) -> set[Any]:
    """What an annotation is made of, two levels deep: the members of a union, and what they hold."""
    return {annotation, *(part for outer in get_args(annotation) for part in (outer, *get_args(outer)))}


def _is_number(annotation: Any) -> bool:
    """Whether a field takes numbers and no truth values."""
    parts = _parts(annotation)
    return bool(parts & {int, float}) and bool not in parts


def _configs(of: type[BaseConfig]) -> list[type[BaseConfig]]:
    return [*of.__subclasses__(), *(deeper for child in of.__subclasses__() for deeper in _configs(child))]


def is_field(name: str) -> bool:
    """Whether any of the configurations has a field of that name."""
    return any(name in config.model_fields for config in _configs(BaseConfig))


def _where_it_is(name: str, cls: type[BaseConfig]) -> str:
    """For the end of a message: where a field that `cls` does not have is (inside one of its own, or in another configuration), or what is near."""
    for field, info in cls.model_fields.items():
        inside = [part for part in _parts(info.annotation) if isinstance(part, type) and issubclass(part, BaseConfig)]
        if any(name in config.model_fields for config in inside):
            entry = ".NAME" if any(get_origin(part) is dict for part in _parts(info.annotation)) else ""
            return f"; did you mean '{field}{entry}.{name}'?"
    if near := did_you_mean(name, cls.model_fields):
        return near
    return next(
        (f"; it is a field of {config.__name__}" for config in _configs(BaseConfig) if name in config.model_fields and not config.__subclasses__()),
        "",
    )


def _check_text(name: str, value: Any) -> None:
    """Text in a configuration ends in file names, in a run's folder and in logs, so it holds nothing that breaks the first and no key or password.

    Raises:
        ValueError: a character that is none (NUL, half of a surrogate pair).
        LmSaesError: credentials. (Not a ValueError: pydantic would quote the value.)
    """
    if isinstance(value, str):
        if CREDENTIALS.search(value):
            raise LmSaesError(
                f"{name} holds a key or a password, and settings are written to the run's folder; pass it as HF_TOKEN or WANDB_API_KEY in the environment"
            )
        if "\0" in value or any("\ud800" <= mark <= "\udfff" for mark in value):
            raise ValueError(f"{name} holds a character that is no text, got {value[:100]!r}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_text(f"{name}.{index}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(name, key)
            _check_text(f"{name}.{key}", item)


class BaseConfig(BaseModel):
    """Base of every configuration: frozen, strict about names, with `replace` for a validated copy."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True, use_enum_values=False, allow_inf_nan=False)

    _dtype_fields: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls._dtype_fields = frozenset(name for name, field in cls.model_fields.items() if any(isinstance(mark, _DType) for mark in field.metadata))

    @model_validator(mode="before")
    @classmethod
    def _unknown_fields_name_their_neighbour(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name in data:
                _check_text(f"a name in {cls.__name__}", name)
                if name not in cls.model_fields:
                    raise ValueError(f"{cls.__name__} has no field '{name}'{_where_it_is(str(name), cls)}")
                if isinstance(data[name], bool) and _is_number(cls.model_fields[name].annotation):  # pydantic would take true for 1
                    raise ValueError(f"{name} needs a number, got {str(data[name]).lower()}")
                _check_text(name, data[name])
        return data

    if not TYPE_CHECKING:

        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if isinstance(value, str) and name in type(self)._dtype_fields and value in _DTYPES:
                import torch

                return getattr(torch, value)
            return value

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated anew (`model_copy(update=...)` would not validate)."""
        kept = {name: self.__dict__[name] for name in self.model_fields_set}
        return type(self).model_validate({**kept, **changes})

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, defaults included."""
        return self.model_dump(mode="json")


class BaseModelConfig(BaseConfig):
    """Base of every configuration of something that lives on a device."""

    device: str = "cpu"
    """Where the weights live: `cpu`, `cuda`, `cuda:N`, `mps`, or `auto` (the best there is). Checked when the model is built, not before."""
    dtype: DType = "float32"
    """Data type of the weights. On disk, the tensors themselves decide."""

    @model_validator(mode="after")
    def _device_has_a_known_name(self) -> Self:
        kind, _, index = self.device.partition(":")
        if kind not in {"cpu", "cuda", "mps", "auto", "meta"} or (index and not index.isdigit()):
            raise ValueError(f"device must be cpu, cuda, cuda:N, mps or auto, got '{self.device}'")
        return self


# ---------------------------------------------------------------------------------------------- files, overrides, errors

ConfigT = TypeVar("ConfigT", bound=BaseConfig)

RUN_RECORDS = ("versions", "resolved")
"""What a run's `settings.json` holds beside the settings that were given: versions, and all settings with the defaults that held."""


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The table in a TOML, YAML or JSON file. The word `none` as a value is null (TOML has no null of its own)."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_TABLE:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; settings have at most {LARGEST_TABLE:,}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = path.parent.iterdir() if path.parent.is_dir() else []
        near = did_you_mean(path.name, [other.name for other in others if other.suffix == path.suffix and other.name != "pyproject.toml"])
        raise ConfigError(f"no config file at {path}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    try:
        match path.suffix.lower():
            case ".toml":
                data = tomllib.loads(text)
            case ".yaml" | ".yml":
                import yaml

                data = yaml.safe_load(text)
            case ".json":
                data = parse_json(text)
            case other:
                raise ConfigError(f"config files end in .toml, .yaml, .yml or .json; got '{other or path.name}'")
        values_within(data)
    except ConfigError:
        raise
    except Exception as error:  # each parser has its own tree of errors; all of them say where
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a table of settings, got {type(data).__name__}")
    return _none_words_to_null(data)


def _none_words_to_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _none_words_to_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_none_words_to_null(item) for item in value]
    return None if isinstance(value, str) and value.lower() == "none" else value


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Overrides from the command line, `--a.b value` or `--a.b=value`, as a nested table. Values are read as JSON where they are JSON,
    as text otherwise; `none` is null; a flag without a value is true."""
    table: dict[str, Any] = {}
    index = 0
    while index < len(words):
        word = words[index]
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(f"expected an override such as --trainer.lr 1e-4, got '{word}'")
        name, equals, text = word[2:].partition("=")
        index += 1
        if not equals:
            if index < len(words) and not (words[index].startswith("--") and not words[index][2:3].isdigit()):
                text = words[index]
                index += 1
            else:
                text = "true"
        _place(table, name.replace("-", "_").split("."), value_of(text))
    try:
        values_within(table)
    except ValueError as error:
        raise ConfigError(f"the command line's options cannot be taken: {error}") from None
    return table


def value_of(text: str) -> Any:
    """A value from the command line: JSON where it is JSON, text otherwise; `none` is null."""
    if text.lower() == "none":
        return None
    try:
        return parse_json(text.lower() if text.lower() in {"true", "false"} else text)
    except ValueError:
        try:
            return float(text)  # 1e-4 without a dot, inf
        except ValueError:
            return text


def _place(table: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override --{'.'.join(path)} goes inside '{name}', which another override sets to a value")
    table[path[-1]] = value


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` laid over it, table by table. A list is reached into by position (`sources.0.name`)."""
    merged = dict(base)
    for name, value in overrides.items():
        current = merged.get(name)
        if isinstance(current, list) and isinstance(value, Mapping) and all(key.isdigit() for key in value):
            items = list(current)
            for key, item in value.items():
                if int(key) >= len(items):
                    raise ConfigError(f"override reaches item {key} of '{name}', which has {len(items)}")
                items[int(key)] = merge(items[int(key)], item) if isinstance(item, Mapping) else item
            merged[name] = items
        elif isinstance(current, Mapping) and isinstance(value, Mapping):
            merged[name] = merge(current, value)
        else:
            merged[name] = value
    return merged


def validated(cls: type[ConfigT], data: Mapping[str, Any], origin: str = "") -> ConfigT:
    """`cls` built from a table; a ValidationError becomes a `ConfigError` of one line that names the field and the origin."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError((f"{origin}: " if origin else "") + one_line(error)) from None


def one_line(error: ValidationError) -> str:
    """A pydantic error as one line: where, what was wanted, what came; the number of further errors at the end."""
    errors = error.errors(include_url=False)
    first = errors[0]
    where = ".".join(str(part) for part in _without_tags(first["loc"]))
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":
        context = first.get("ctx", {})
        what = f"no type '{context.get('tag')}'; there are {context.get('expected_tags')}"
    given = first.get("input")
    shown = f" (got {_shown(given)})" if first["type"] not in {"value_error", "missing"} and not isinstance(given, Mapping) else ""
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}: {what}{shown}{more}" if where else f"{what}{shown}{more}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else shown[:197] + "..."


def _without_tags(location: Sequence[int | str]) -> list[int | str]:
    """The location of an error without the member that pydantic names when it has chosen one of a union ('sae', 'sae' or 0, 'dataset')."""
    tags = {"sae", "pretrained", "dataset", "activations"}
    return [
        part
        for index, part in enumerate(location)
        if index == 0 or part not in tags or (part != location[index - 1] and isinstance(location[index - 1], str) and part != "pretrained")
    ]


def load_settings(cls: type[ConfigT], path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> ConfigT:
    """Settings from a file (if any) with overrides laid over it: defaults < file < overrides."""
    data = read_config_file(path) if path is not None else {}
    data = {name: value for name, value in data.items() if name not in RUN_RECORDS}  # a run's settings.json is a settings file too
    origin = str(path) if path is not None else ""
    return validated(cls, merge(data, overrides or {}), origin=f"{origin} with the command line's options" if origin and overrides else origin)
