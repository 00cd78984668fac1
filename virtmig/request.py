"""What a person asked for: checked against the table, frozen, and nothing else. No connection is needed for it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from virtmig.errors import RequestError
from virtmig.options import BY_NAME, OPTIONS, RULES, SPELLINGS, U64_MAX, Kind, Option

Value = bool | int | str | tuple[str, ...]

#: libvirt's QEMU driver knows these migration URI schemes (qemu_migration.c qemuMigrationAnyPrepareDef)
URI_SCHEMES = ("tcp", "rdma", "unix")

#: what virStrToLong reads in base 10: leading white space and a sign, then digits to the end; no 0x, no underscores
_NUMBER = re.compile(r"[ \t\n\v\f\r]*[+-]?[0-9]+", re.ASCII)


class MigrationRequest(Mapping[str, Value]):
    """One request: a domain, a destination, and the options that were given, by name.

    A mapping from option names (virsh's spelling, without dashes) to values: True, a number, a string, or a tuple of
    strings; options that were not given are absent. `get()` therefore answers "what did the person say", and the
    absence of an answer leaves the choice to the plan. Values are checked in full when the object is made:
    RequestError carries every problem at once.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Value]) -> None:
        problems: list[tuple[str, str, str]] = []
        checked: dict[str, Value] = {}
        for spelling, value in values.items():
            option = SPELLINGS.get(spelling)
            if option is None:
                problems.append(_unknown("migrate", spelling, SPELLINGS))
            elif value is not None and value is not False:
                try:
                    checked[option.name] = check_value(option, value)
                except RequestError as error:
                    problems.append((option.name, error.message, error.hint))
        if "threads" in checked:
            if checked.get("parallel-connections", checked["threads"]) != checked["threads"]:
                problems.append(
                    ("threads", "--threads and --parallel-connections name different numbers", "give one of them")
                )
            checked["parallel"] = True
            checked["parallel-connections"] = checked["threads"]
        problems += _missing("migrate", OPTIONS, checked.keys() | {problem[0] for problem in problems})
        problems += _check_rules(checked)
        if problems:
            raise combined(problems)
        self._values = MappingProxyType(checked)

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return (option.name for option in OPTIONS if option.name in self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"MigrationRequest({dict(self._values)!r})"

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._values.items())))

    @property
    def domain(self) -> str:
        return str(self._values["domain"])

    @property
    def destination_uri(self) -> str:
        return str(self._values["desturi"])

    def number(self, name: str) -> int | None:
        """The number given for `name`, else the table's default as a number, else None."""
        value = self._values.get(name)
        if value is None:
            default = BY_NAME[name].default
            return int(default) if default else None
        return int(value) if isinstance(value, int) else None

    def text(self, name: str) -> str:
        """The string given for `name`, else the table's default."""
        value = self._values.get(name)
        return str(value) if value is not None else BY_NAME[name].default

    def words(self, name: str) -> tuple[str, ...]:
        value = self._values.get(name, ())
        return value if isinstance(value, tuple) else (str(value),)

    def replace(self, **changes: Value | None) -> MigrationRequest:
        """The same request with some options changed; None takes one away. Names with underscores."""
        values: dict[str, Value] = dict(self._values)
        for field, value in changes.items():
            name = field.replace("_", "-")
            if value is None or value is False:
                values.pop(name, None)
            else:
                values[name] = value
        if "parallel_connections" in changes or "parallel" in changes:
            values.pop("threads", None)
        return MigrationRequest(values)

    def virsh_line(self, connect: str = "") -> str:
        """The `virsh migrate` line that asks for the same, as far as virsh has words for it."""
        return self._line("virsh", connect, ours=False)

    def virtmig_line(self, connect: str = "") -> str:
        """The `virtmig migrate` line of this request."""
        return self._line("virtmig", connect, ours=True)

    def _line(self, program: str, connect: str, *, ours: bool) -> str:
        words = [program, *(["-c", connect] if connect else []), "migrate"]
        for name in self:
            option, value = BY_NAME[name], self._values[name]
            if option.ours and not ours:
                continue
            if option.required and not str(value).startswith("--"):
                words.append(str(value))
            elif option.kind is Kind.BOOL:
                words.append(f"--{name}")
            else:
                words += [f"--{name}", ",".join(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)


def check_values(command: str, options: Sequence[Option], values: Mapping[str, object]) -> dict[str, Value]:
    """The values of one sibling verb, checked against its own small table; RequestError carries every problem."""
    rows = {option.name: option for option in options}
    problems: list[tuple[str, str, str]] = []
    checked: dict[str, Value] = {}
    for name, value in values.items():
        if name not in rows:
            problems.append(_unknown(command, name, rows))
        elif value is not None and value is not False:
            try:
                checked[name] = check_value(rows[name], value)
            except RequestError as error:
                problems.append((name, error.message, error.hint))
    problems += _missing(command, options, checked.keys() | {problem[0] for problem in problems})
    if problems:
        raise combined(problems)
    return checked


def check_value(option: Option, value: object) -> Value:
    """One value in the type, unit and range of its row; text is parsed. Raises RequestError in virsh's words."""
    if option.kind is Kind.BOOL:
        if value is not True:
            raise RequestError(f"option --{option.name} takes no value", option=option.name)
        return True
    if option.kind is Kind.NUMBER:
        return _check_number(option, value)
    if option.kind is Kind.LIST:
        words = value if isinstance(value, (list, tuple)) else _text(option, value).split(",")
        return _check_words(option, tuple(_text(option, word) for word in words))
    text = _text(option, value)
    if not text:
        raise RequestError(f"Failed to get option '{option.name}': Option argument is empty", option=option.name)
    if option.kind is Kind.CHOICE and text not in option.choices:
        raise RequestError(
            f"'{text}' is not a value of --{option.name}",
            option=option.name,
            hint=f"one of {', '.join(option.choices)}",
        )
    if option.name == "migrateuri":
        _check_migrate_uri(text)
    if option.name == "dname" and "/" in text:
        raise RequestError(f"name {text} cannot contain '/'", option="dname", hint="a name without slashes")
    return text


def _text(option: Option, value: object) -> str:
    """Text that libvirt can be given: its binding raises on a NUL and on bytes that are not UTF-8."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RequestError(f"option --{option.name} takes text, not {type(value).__name__}", option=option.name)
    text = str(value)
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(f"the value of option --{option.name} is not valid UTF-8 text", option=option.name)
    return text


def _check_number(option: Option, value: object) -> int:
    low, high = option.minimum or 0, option.maximum if option.maximum is not None else U64_MAX
    takes = f"--{option.name} takes {low} to {high}{' ' + option.unit if option.unit else ''}"
    malformed = RequestError(
        f"Numeric value '{value}' for <{option.name}> option is malformed or out of range",
        option=option.name,
        hint=takes,
    )
    if isinstance(value, str):
        # twenty digits hold 64 bits; int() of a text of thousands of digits raises
        if not _NUMBER.fullmatch(value) or len(value.strip().lstrip("+-0")) > 20:
            raise malformed
        number = int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        raise malformed
    if number > high and option.unit == "MiB/s":
        what = f"migration parameter '{option.param}'" if option.param else option.name
        raise RequestError(f"numerical overflow: {what} must be less than {high + 1}", option=option.name, hint=takes)
    if not low <= number <= high:
        raise malformed
    if option.power_of_two and number & (number - 1):
        raise RequestError(
            f"--{option.name} must be a power of two no less than the target page size, not {number}",
            option=option.name,
            hint=f"for example {1 << (number.bit_length() - 1)}",
        )
    return number


def _check_words(option: Option, words: tuple[str, ...]) -> tuple[str, ...]:
    if not words or not all(words):
        raise RequestError(f"Failed to get option '{option.name}': Option argument is empty", option=option.name)
    for word in words:
        if option.name == "comp-methods":
            if word not in option.choices:
                raise RequestError(
                    f"Unsupported compression method '{word}'",
                    option=option.name,
                    hint=f"one of {', '.join(option.choices)}",
                )
            if words.count(word) > 1:
                raise RequestError(f"Compression method '{word}' is specified twice", option=option.name)
        elif words.count(word) > 1:
            raise RequestError(f"'{word}' is named twice in --{option.name}", option=option.name)
    return words


def _check_migrate_uri(text: str) -> None:
    scheme = text.partition(":")[0]
    if scheme not in URI_SCHEMES:
        raise RequestError(
            f"unsupported scheme {scheme} in migration URI {text}",
            option="migrateuri",
            hint="virtmig's own options (-c, -q, ...) go before the command"
            if text.startswith("-")
            else "tcp://HOST[:PORT], unix:///path, or rdma://HOST",
        )
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise RequestError(f"malformed migration URI {text}: {error}", option="migrateuri") from None
    if text.partition(":")[2].startswith(":"):
        raise RequestError(f"malformed migration URI: {text}", option="migrateuri", hint="tcp://HOST[:PORT]")
    if scheme != "unix" and text.partition(":")[2].startswith("//") and not parts.hostname:
        raise RequestError(f"missing host in migration URI: {text}", option="migrateuri", hint="tcp://HOST[:PORT]")
    if scheme == "unix" and not parts.path.startswith("/"):
        raise RequestError(
            f"migration URI {text} names no absolute path", option="migrateuri", hint="unix:///run/x/migrate.sock"
        )
    try:
        _ = parts.port
    except ValueError:
        raise RequestError(f"invalid port number in migration URI: {text}", option="migrateuri") from None


def tokens(values: Mapping[str, Value]) -> frozenset[str]:
    """What the rules speak about: names of given options, and name=value for those whose value decides."""
    found = set(values)
    for word in values.get("comp-methods", ()) if isinstance(values.get("comp-methods"), tuple) else ():  # type: ignore[union-attr]
        found.add(f"comp-methods={word}")
    for name in ("migrateuri", "disks-uri"):
        if name in values:
            found.add(f"{name}={str(values[name]).partition(':')[0]}")
    for name in ("on-stall", "postcopy-preempt", "transport"):
        if name in values:
            found.add(f"{name}={values[name]}")
    return frozenset(found)


def _check_rules(values: Mapping[str, Value]) -> list[tuple[str, str, str]]:
    present = tokens(values)
    problems = []
    for rule in RULES:
        if not present.issuperset(rule.when):
            continue
        if (rule.needs and present.isdisjoint(rule.needs)) or not present.isdisjoint(rule.excludes):
            problem = (rule.when[0].partition("=")[0], rule.message, rule.hint)
            if problem not in problems:
                problems.append(problem)
    return problems


def combined(problems: list[tuple[str, str, str]]) -> RequestError:
    """One error that carries every (option, message, way out), in this order."""
    error = RequestError(
        "\n".join(dict.fromkeys(message for _, message, _ in problems)),
        option=problems[0][0],
        hint="; ".join(dict.fromkeys(hint for _, _, hint in problems if hint)),
    )
    error.problems = tuple(problems)
    return error


def _unknown(command: str, spelling: str, known: Iterable[str]) -> tuple[str, str, str]:
    return spelling, f"command '{command}' doesn't support option --{spelling}", near_option(command, spelling, known)


def _missing(command: str, options: Iterable[Option], seen: Iterable[str]) -> list[tuple[str, str, str]]:
    missing = [row.name for row in options if row.required and row.name not in set(seen)]
    return [(name, f"command '{command}' requires <{name}> option", "") for name in missing]


def near_option(command: str, spelling: str, known: Iterable[str]) -> str:
    """The hint for an option that `command` does not have."""
    import difflib

    near = difflib.get_close_matches(spelling, list(known), n=1)
    return f"did you mean --{near[0]}?" if near else f"see: virtmig help {command}"


def read_file_values(values: Mapping[str, Value]) -> dict[str, Value]:
    """The same values with the files of FILE rows (--xml, --persistent-xml) replaced by what is in them.

    virsh reads at most 10 MiB (VSH_MAX_XML_FILE) and complains in two lines; so do we.
    """
    result: dict[str, Value] = {}
    for name, value in values.items():
        option = BY_NAME[name]
        if option.kind is Kind.FILE:
            try:
                raw = Path(str(value)).read_bytes()
                if len(raw) > 10 << 20:
                    raise OSError(f"larger than {10 << 20} bytes")
                result[name] = raw.decode()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise RequestError(
                    f"cannot read file '{value}'\nFailed to open file '{value}': {reason}", option=name
                ) from None
        else:
            result[name] = value
    return result
