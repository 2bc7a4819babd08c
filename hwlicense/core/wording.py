"""What is wrong with a term, in people's words: msgspec says it in words of JSON and Python."""

from __future__ import annotations

import re
from typing import Final

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
    r"Expected `object` of length <= (.*)": "{term} has too many entries: it takes at most {0}",
}


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


def _name(path: str) -> str:
    if path.endswith("[...]"):
        return f"a value in {path.removesuffix('[...]')}"
    if entry := re.fullmatch(r"(.*)\[([0-9]+)\]", path):
        return f"entry {int(entry[2]) + 1} of {entry[1]}"
    return path


def _number(text: str) -> str:
    return f"{int(text):,}" if text.isdecimal() else text
