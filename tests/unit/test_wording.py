"""What people read: numbers of things."""

import re
from pathlib import Path

import hwlicense
from hwlicense.core.wording import quantity

# What a number stands before, in what people read; see `quantity`.
COUNTED = "sources files faults records outputs inputs bindings certificates days"


def test_one_thing_is_one_thing():
    assert [quantity(number, "file") for number in (0, 1, 2, 1000)] == ["0 files", "1 file", "2 files", "1,000 files"]
    assert quantity(1, "NV index", "NV indexes") == "1 NV index"
    assert quantity(2, "NV index", "NV indexes") == "2 NV indexes"


def test_no_message_makes_a_plural_of_its_own():
    """But where what is named has a limit that is more than one, in capitals, or is a part of such a number."""
    found = []
    for path in Path(hwlicense.__file__).parent.rglob("*.py"):
        for line in path.read_text().splitlines():
            for number, noun in re.findall(r"(?<!of )\{([^{}]*)\} (\w+s)\b", line):
                if noun in COUNTED.split() and not re.fullmatch(r"[A-Z_.a-z]*LIMIT(:,)?", number):
                    found.append((path.name, line.strip()))
    assert found == []
