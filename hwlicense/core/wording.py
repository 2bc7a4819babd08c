"""People's words: numbers of things, and what is wrong with a term, which msgspec says in words of JSON and Python."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_KINDS: Final = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "date": "a day, such as 2027-12-31",
    "datetime": "a day with a time",
    "time": "a time",
}
_PLACE: Final = re.compile(r"(?P<problem>.*?)(?: - at (?P<key>`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
_PROBLEMS: Final = {
    r"Object missing required field `(.*)`": "{term} is missing",
    r"Object contains unknown field `(.*)`": "there is no term {term}",
    r"Invalid enum value (.*)": "{term} cannot be {0}",
    r"Expected `(?:int|float)` >= (.*)": "{term} must be at least {0}",
    r"Expected `(?:int|float)` <= (.*)": "{term} must be at most {0}",
    r"Expected `str` of length >= (1)": "{term} is empty",
    r"Expected `str` of length <= (.*)": "{term} is too long: it takes at most {0} characters",
    r"Expected `array` of length <= (.*)": "{term} has too many entries: it takes at most {0}",
    r"Expected `(?:array|object)` of length >= (1)": "{term} is empty",
    r"Expected `object` of length <= (.*)": "{term} has too many entries: it takes at most {0}",
}

TOML: Final = "Mend that line: text stands in quotes, numbers do not; they may have _ between thousands, and no comma."
"""What to do about what is no TOML."""

_HINTS: Final = {
    r"Expected `int.*`, got `str`": "Write the number without quotes.",
    r"Expected `int.*`, got `float`": "Write a whole number, such as 1_000_000; 1e6 and 1.0 are none.",
    r"Expected `int` [<>]= .*": "Write a number in these bounds. Leave the term out where nothing is to be limited.",
    r"Expected `array.*`, got `str`": 'Write a list, in brackets: ["..."].',
    r"Expected `str.*`, got `int`": 'Write it in quotes; a duration has a unit, such as "10s".',
    r"Expected `date.*`, got `str`": "Write the day without quotes, such as 2027-12-31.",
    r"Expected `bool`, got .*": "Write true or false, without quotes.",
}


def quantity(number: int, noun: str, plural: str = "") -> str:
    """So many of a thing, such as 1 file or 2 files; `plural` where it is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def in_words(error: str) -> str:
    """`error`, as msgspec gives it when it converts a table, as the rest of a sentence; what is not known stays."""
    place = _PLACE.fullmatch(error)
    if not place:
        return error
    problem, path = place["problem"], place["path"] or ""
    term = _name(path)
    if place["key"]:
        term = f"a name in {term}"
    if kinds := re.fullmatch(r"Expected `(.*)`, got `(.*)`", problem):
        wanted = [_KINDS.get(kind, kind) for kind in kinds[1].split(" | ") if kind != "null"]
        given = "a number with a fraction" if kinds[2] == "float" else _KINDS.get(kinds[2], kinds[2])
        return f"{term} must be {' or '.join(wanted)}, not {given.partition(',')[0]}"
    for pattern, words in _PROBLEMS.items():
        if match := re.fullmatch(pattern, problem, re.DOTALL):
            if "field" in pattern:
                return words.format(term=f"{term}.{match[1]}" if term else match[1])
            return words.format(_number(match[1]), term=term)
    return error


def mend(error: str, names: list[str], choices: Mapping[str, str]) -> str:
    """What to do about `error`. `names` are those of all terms; those of tables end with a dot.

    `choices` are the words that a term takes, in a sentence, where it takes no others.
    """
    place = _PLACE.fullmatch(error)
    problem, path = (place["problem"], place["path"] or "") if place else (error, "")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", problem, re.DOTALL):
        found = " or ".join(_shown(name) for name in _meant(path, unknown[1], names))
        meant = f"Did you mean {found}? " if found else ""
        return f"{meant}docs/terms.md lists the terms; one that is not known is never ignored."
    if words := choices.get(re.sub(r"\[[0-9]+\]$", "", path)):
        return f"Write {words}."
    for pattern, hint in _HINTS.items():
        if re.fullmatch(pattern, problem, re.DOTALL):
            return hint
    return "docs/terms.md lists the terms, and what each may be."


def _meant(path: str, key: str, names: list[str]) -> list[str]:
    """Terms that may have been meant: of that name, or one like it, in another table; or like it in the same."""
    import difflib  # noqa: PLC0415  # only who writes terms pays for it

    full = f"{path}.{key}" if path else key
    keys = {name: name.rstrip(".").rpartition(".") for name in names}
    if same := [name for name, (_, _, last) in keys.items() if last == key]:
        return same
    here = {last: name for name, (table, _, last) in keys.items() if table == path}
    if close := difflib.get_close_matches(key, here, n=1):
        return [here[close[0]]]
    return difflib.get_close_matches(full, names, n=1, cutoff=0.75)


def _shown(name: str) -> str:
    return f"[{name[:-1]}]" if name.endswith(".") else name


def _name(path: str) -> str:
    if path.endswith("[...]"):
        return f"a value in {path.removesuffix('[...]')}"
    if entry := re.fullmatch(r"(.*)\[([0-9]+)\]", path):
        return f"entry {int(entry[2]) + 1} of {entry[1]}"
    return path


def _number(text: str) -> str:
    return f"{int(text):,}" if text.isdecimal() else text
