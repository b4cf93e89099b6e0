"""Flags of a command to its settings, with every error in one line: ``flag: expected ...; got ...``.

The settings of a command are a dataclass, whose fields tyro makes flags of. Fields of nested dataclasses are flags too:
``--guidance.weight`` for the field ``weight`` of ``guidance``, or ``--weight`` where ``guidance`` is annotated as
:data:`Flat`.
"""

import contextlib
import difflib
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from ..compatibility import current_flags
from ..validation import PerBlock

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Flat", "UsageError", "fields_of", "flags_of", "parse"]

Settings = TypeVar("Settings", bound="DataclassInstance")
Flat = Annotated[Settings, tyro.conf.arg(name="")]
"""A field whose own fields are flags without its name before theirs."""

Hides = Callable[[type, Field], bool]


class UsageError(ValueError):
    """Arguments that are no flags or values of a command."""


def parse(
    kind: type[Settings],
    arguments: Sequence[str],
    *,
    default: Settings | None = None,
    hides: Hides = lambda kind, field: False,
    build: Callable[..., Any] = replace,
    elsewhere: Mapping[str, str] | None = None,
) -> tuple[Settings, dict[str, str]]:
    """Read the flags of a command.

    Args:
        kind: the settings of the command, named like it.
        arguments: the flags and their values.
        default: the values of the fields whose flags are not given.
        hides: whether a field, of a class of settings, has no flag.
        build: makes settings of default ones and of the values of the fields that have flags, by their names.
        elsewhere: flags that the command has with other flags than the given ones, and which these are.

    Returns:
        the settings, and the flags that were given, each with the argument that it stood in.

    Raises:
        UsageError: an argument is no flag or value of the command.
        ValueError: the settings are not valid.
    """
    name, flags = kind.__name__.lower(), [*flags_of(kind, default, hides)]
    command, arguments = f"tarflow {name}", current_flags(name, arguments, flags)
    _check_flags(command, arguments, flags, elsewhere or {})
    options: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), _registry(hides, build):
            settings = tyro.cli(kind, args=arguments, prog=command, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        needed = [field.name for field in fields(kind) if field.default is MISSING and default is None]
        raise UsageError(_one_line(printed.getvalue(), " and ".join(needed))) from None
    named = {argument.partition("=")[0].replace("_", "-"): argument for argument in arguments}
    return settings, {flag: argument for flag, argument in named.items() if flag in flags}


def flags_of(
    kind: type, default: Any = None, hides: Hides = lambda kind, field: False, prefix: str = "--"
) -> Iterator[str]:
    """The flags of settings of that kind."""
    for field, hint, value in _visible(kind, default, hides):
        name, inner = field.name.replace("_", "-"), get_args(hint)[0] if get_origin(hint) is Annotated else hint
        is_nested = is_dataclass(inner)
        if hint == cast(Any, tyro.conf.Positional)[inner]:
            continue
        if is_nested:
            yield from flags_of(inner, value, hides, prefix if inner is not hint else f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
            if inner is bool:
                yield f"{prefix}no-{name}"


def fields_of(flags: Iterable[str]) -> set[str]:
    """The names of the fields that flags without a dot stand for.

    >>> fields_of(["--no-drop-label"])
    {'drop_label'}
    """
    return {flag.removeprefix("--no-").removeprefix("--").replace("-", "_") for flag in flags}


def _visible(kind: type, default: Any, hides: Hides) -> Iterator[tuple[Field, Any, Any]]:
    """The fields that have flags, their types and their defaults.

    Of several nested dataclasses the type is that of the default; one that may be absent is there.
    """
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, value = hints[field.name], getattr(default, field.name, None)
        inner, *annotations = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        nested: list[Any] = [option for option in (inner, *get_args(inner)) if is_dataclass(option)]
        if nested:
            value = nested[0]() if value is None else value
            hint = Annotated[(type(value), *annotations)] if annotations else type(value)
        if not hides(kind, field):
            yield field, hint, value


@contextlib.contextmanager
def _registry(hides: Hides, build: Callable[..., Any]) -> Iterator[None]:
    """Within the block tyro makes flags of the visible fields alone, and settings by ``build``."""
    registry, is_asking = ConstructorRegistry(), False

    @registry.struct_rule
    def visible_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal is_asking
        if is_asking or not is_dataclass(info.type):
            return None
        is_asking = True
        spec = registry.get_struct_spec(info)  # by tyro's own rule for dataclasses, with the help texts
        is_asking = False
        assert isinstance(spec, StructConstructorSpec)
        default = info.default if isinstance(info.default, info.type) else None
        told = {field.name: (hint, value) for field, hint, value in _visible(info.type, default, hides)}
        shown = tuple(_shown(part, info.type, *told[part.name]) for part in spec.fields if part.name in told)
        if default is None:
            return replace(spec, fields=shown)

        def instantiate(**values: Any) -> Any:
            return build(default, **values)

        instantiate.__doc__ = info.type.__doc__  # for --help
        return StructConstructorSpec(instantiate, shown)

    with registry:
        yield


def _shown(part: StructFieldSpec, kind: type, hint: Any, value: Any) -> StructFieldSpec:
    """A field as tyro is to show it, with the help that its class has for several fields at once, ``a, b: ...``."""
    together = re.search(rf"^ +(?:\w+, )*{part.name}(?:, \w+)*: (.*(?:\n {{12}} *\S.*)*)", kind.__doc__ or "", re.M)
    if together and "," in together[0].partition(":")[0]:
        part = replace(part, helptext=" ".join(together[1].split()))
    if hint == PerBlock:
        part = replace(part, type=cast(Any, Annotated[PerBlock, tyro.conf.arg(metavar="INT [INT ...]")]))
    return replace(part, type=hint, default=value) if is_dataclass(value) else part


def _check_flags(command: str, arguments: Sequence[str], flags: Sequence[str], elsewhere: Mapping[str, str]) -> None:
    """Raise UsageError for empty values, unknown flags, and flags that the command has ``elsewhere``."""
    for before, argument in itertools.pairwise(["", *itertools.takewhile("--".__ne__, arguments)]):
        flag, equals, value = argument.partition("=")
        if not argument or (flag.startswith("--") and equals and not value):
            named = flag or (before if before in flags else "arguments")
            raise UsageError(f"{named}: expected a value; got ''")
        name = flag.replace("_", "-")
        if not flag.startswith("--") or name in (*flags, "--help") or name.startswith("--tyro"):
            continue
        if name in elsewhere:
            raise UsageError(f"{flag}: expected with {elsewhere[name]} alone, which has a use for it; got {argument}")
        close = difflib.get_close_matches(flag, flags, 1, cutoff=0.7)
        hint = f", perhaps {close[0]}" if close else ""
        raise UsageError(f"{flag}: expected a flag of {command}{hint}; got {argument!r}")


_REPHRASED = (
    (
        r"Error parsing (\S+): no type matching .* could be instantiated from \[(.*)\]\.",
        r"\1: expected {expected}; got \2",
    ),
    (r"Error parsing (\S+): [^'\"\[]*\[?(.+?)\]?", r"\1: expected {expected}; got \2"),
    (r"Error parsing \w+\.(\S+): (\w+: expected .*)", r"--\1.\2"),
    (r"Error parsing \w+: (\w+: expected .*)", r"\1"),
    (r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)\.", r"\2: expected one of \3; got \1"),
    (r"Argument (\S+): invalid choice: (.*) \(choose from (.*)\)", r"\1: expected one of \3; got \2"),
    (r"Missing value for argument '(.*)'\. Expected .*", r"\1: expected a value; got none"),
    (r"Argument (\S+): expected .*", r"\1: expected a value; got none"),
    (r"(?:Missing from|The following arguments are required:) .*", r"arguments: expected {needed}; got fewer"),
    (r"Unrecognized (?:options|arguments): (.*)", r"arguments: expected flags, each with its value; got \1 besides"),
)
"""Errors of tyro, by its versions, and our words for them."""


def _one_line(box: str, needed: str) -> str:
    """The error in the box that tyro draws around it, in a line: ``flag: expected ...; got ...``."""
    lines = [line.strip(" │╭╮╰╯─") for line in box.splitlines()]
    title, *lines = ["" if set(line) <= {"-"} else line for line in lines]
    message = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines)))
    _, _, usage = "\n".join(lines).partition("Argument helptext:\n")
    expected = usage.partition("\n")[0].partition(" ")[2]
    for pattern, sentence in _REPHRASED:
        if (found := re.fullmatch(pattern, message)) and (expected or "{expected}" not in sentence):
            return found.expand(sentence.replace("{expected}", expected).replace("{needed}", needed))
    return f"{title}: {message}"
