"""Frozen recordings: two of one log, certified by a TPM, verified to the end, and refused with any line missing."""

from pathlib import Path

import pytest

from hwlicense.core.chain import Output, parse
from hwlicense.core.schema import encode
from hwlicense.device.home import read_vendor
from hwlicense.vendor import logs

HERE = Path(__file__).parent
VENDOR = read_vendor((HERE / "vendor-3.pub.json").read_bytes())
FILES = [HERE / "outputs-1.hwout", HERE / "outputs-2.hwout"]
LICENSED = logs.licenses([HERE / "license-3.hwlic"], VENDOR)


def test_they_are_intact():
    checked = logs.check(FILES, LICENSED)
    assert checked.faults == []
    assert [(each.statement.recording, each.outputs, each.inputs, each.signed) for each in checked.recordings] == [
        (1, 2, 1, 6),
        (2, 1, 0, 3),
    ]
    assert [[quote.clock for quote in each.quotes] for each in checked.recordings] == [[322, 347], [363, 380]]
    lines = FILES[0].read_bytes().split(b"\n")
    record = parse(lines[2])
    assert isinstance(record, Output)
    assert bytes(record.json) == b'{"alert":"odd frame","score":0.97}'  # type: ignore[arg-type]  # Raw is a buffer
    assert [encode(parse(line)) for line in lines[:-1]] == lines[:-1]


@pytest.mark.parametrize("place", range(6))
def test_none_of_their_lines_can_be_left_out(place, tmp_path):
    lines = FILES[0].read_bytes().split(b"\n")
    changed = tmp_path / "changed.hwout"
    changed.write_bytes(b"\n".join(lines[:place] + lines[place + 1 :]))
    checked = logs.check([changed, FILES[1]], LICENSED)
    assert checked.has("forged")
