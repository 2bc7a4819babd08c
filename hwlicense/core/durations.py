"""Durations and rates: as people write them in terms, and as they are shown to people."""

from __future__ import annotations

import math
import re
from typing import Final

from hwlicense.core.errors import Reason, UsageError
from hwlicense.core.limits import LONGEST_WINDOW, Rate

UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
"""Seconds of the units of a duration in terms."""

FRAMES: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}
"""Seconds of the time frames that have names."""

_MOST: Final = 2**53 - 1
_DIGITS: Final = 30
_SHORT: Final = {"second": "sec", "minute": "min", "hour": "hr", "day": "d", "week": "wk"}
_SHOWN: Final = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_FINE: Final = 10  # seconds below which tenths matter


def spelled(seconds: float, parts: int = len(_SHOWN)) -> str:
    """As "2 min 5 s", in at most so many units; rounded up, so that who waits so long has waited enough."""
    if seconds < _FINE:
        return f"{math.ceil(round(seconds * 10, 6)) / 10:g} s"
    whole = math.ceil(round(seconds, 6))
    first = next(at for at, (_, size) in enumerate(_SHOWN) if whole >= size)
    last = _SHOWN[first:][:parts][-1][1]
    whole = -(-whole // last) * last
    text = []
    for name, size in _SHOWN:
        count, whole = divmod(whole, size)
        if count:
            text.append(f"{count:,} {name}")
    return " ".join(text)


def waiting(seconds: float) -> str:
    """How long to wait, in the two largest units."""
    return spelled(seconds, 2)


def of_rate(rate: Rate) -> str:
    """As in terms: "100/hour", "5/90s"."""
    names = [name for name, size in FRAMES.items() if size == rate.seconds]
    names += [f"{rate.seconds // size}{unit}" for unit, size in reversed(UNITS.items()) if not rate.seconds % size]
    return f"{rate.count}/{names[0]}"


# ---- what terms say


def parse_rate(term: str, text: str) -> Rate:
    """Raises UsageError TERM_INVALID, with what is wrong."""
    digits, slash, frame = text.partition("/")
    count, whole = digits.replace("_", ""), re.fullmatch("[0-9_]*[0-9][0-9_]*", digits, re.ASCII)
    seconds = FRAMES.get(frame) or _duration(frame)
    if whole and seconds and len(count) <= _DIGITS and 1 <= int(count) <= _MOST and seconds <= LONGEST_WINDOW:
        return Rate(int(count), seconds)
    if not slash:
        trouble = "it has no '/' between number and time frame"
    elif " " in text:
        trouble = "it has spaces"
    elif not whole:
        trouble = f"{digits!r} is no whole number" if digits else "it has no number"
    elif not count.strip("0"):
        trouble = "it allows nothing"
    elif len(count) > _DIGITS or int(count) > _MOST:
        trouble = f"its number is above {_MOST:,}"
    elif seconds is None:
        trouble = f"there is no time frame {frame!r}" if frame else "it has no time frame"
    else:
        trouble = f"its time frame must be from 1 s to {spelled(LONGEST_WINDOW)}"
    frames = ", ".join(FRAMES)
    hint = f"""Write a number, at least 1, '/' and a time frame: "100/hour", "5/90s"; {frames}, or a duration."""
    raise UsageError(Reason.TERM_INVALID, f"{term} has {text!r}: {trouble}.", _meant(_meant_rate(text), text) + hint)


def parse_seconds(term: str, text: str, least: int, most: int) -> int:
    """The seconds of a duration. Raises UsageError TERM_INVALID, with what is wrong."""
    found = _duration(text)
    if found is not None and least <= found <= most:
        return found
    number = re.match(r"[-+0-9.,_]*", text, re.ASCII)
    digits = number[0] if number else ""
    unit = text[len(digits) :].strip()
    if found is not None:
        trouble = f"it must be from {spelled(least)} to {spelled(most)}"
    elif not digits:
        trouble = "it has no number" if text else "it is empty"
    elif not digits.isdecimal():
        trouble = f"{digits!r} is no whole number"
    elif unit not in UNITS:
        trouble = f"there is no unit {unit!r}" if unit else "it has no unit"
    else:
        trouble = "it has spaces"
    meant = None
    if digits.isdecimal() and not unit.startswith("mo"):
        meant = f"{digits}{next((each for each in UNITS if unit.startswith(each)), '' if unit else 's')}"
    hint = 'Write a whole number and a unit (s, m, h, d), such as "10s"'
    hint = f"{_meant(meant, text)}{hint}: from {spelled(least)} to {spelled(most)}."
    raise UsageError(Reason.TERM_INVALID, f"{term} is {text!r}: {trouble}.", hint)


def parse_milliseconds(term: str, text: str) -> int:
    """At most a day. The one duration that may be shorter than a second. Raises UsageError TERM_INVALID."""
    if match := re.fullmatch(r"(?!0+ms)([0-9]{1,7})ms", text, re.ASCII):
        return int(match[1])
    return parse_seconds(term, text, 1, 86400) * 1000


def _duration(text: str) -> int | None:
    match = re.fullmatch(r"([0-9]{1,18})([smhd])", text, re.ASCII)
    return int(match[1]) * UNITS[match[2]] if match else None


def _meant_rate(text: str) -> str | None:
    match = re.fullmatch(r"([0-9][0-9_,]*) *(?:/|per|in|a|an|each) *([a-zA-Z]+)", text, re.ASCII)
    if match is None or len(match[1]) > _DIGITS:
        return None
    count, frame = match[1].replace(",", "").replace("_", ""), match[2].lower()
    close = [name for name in FRAMES if name.startswith(frame.rstrip("s")) or frame in (name + "s", _SHORT[name])]
    return f"{count}/{close[0]}" if close and count.strip("0") else None


def _meant(text: str | None, given: str) -> str:
    return "" if text in (None, given) else f'Did you mean "{text}"? '
