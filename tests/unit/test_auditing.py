"""Recordings and their audit, over a key in software: all that is done to one shows, and nothing else does."""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from hwlicense.core import auditing
from hwlicense.core.auditing import check_order
from hwlicense.core.chain import (
    LINE_LIMIT,
    PAYLOAD_LIMIT,
    Chain,
    Checkpoint,
    End,
    Heartbeat,
    Input,
    Output,
    Sensor,
    Start,
    digest,
    parse,
    plain_json,
    signed_bytes,
)
from hwlicense.core.errors import ClosedError, DamagedError, UsageError
from hwlicense.core.schema import encode
from tests.recorded import SIGNER, Log, Signer, audited, licensed, severities

COUNT = 1000


def what(recorded) -> str:
    return " / ".join(f"{fault.severity} {fault.record}: {fault.what}" for fault in recorded.faults)


def test_a_recording_is_what_it_is():
    found = audited(Log().record(COUNT))
    assert (found.faults, found.records, found.signed, found.ended) == ([], COUNT, COUNT, True)
    assert found.hardware == "token"


def edited(lines, place):
    line = lines[place]
    changed = line.replace(b'"wall":1', b'"wall":2', 1)
    return [*lines[:place], changed, *lines[place + 1 :]]


def payload_edited(lines, place):
    changed = lines[place].replace(b'"alert":', b'"blert":')
    return [*lines[:place], changed, *lines[place + 1 :]] if changed != lines[place] else edited(lines, place)


def without(lines, place):
    return [*lines[:place], *lines[place + 1 :]]


def cut_from(lines, place):
    return lines[:place]


def swapped(lines, place):
    other = (place + 1) % len(lines)
    result = list(lines)
    result[place], result[other] = lines[other], lines[place]
    return result


def doubled(lines, place):
    return [*lines[: place + 1], lines[place], *lines[place + 1 :]]


def invented(lines, place):
    """A record of the forger's, that follows the one before it as it should."""
    before = parse(lines[place])
    forged = Output(before.number + 1, digest(lines[place]), before.wall, before.boot, msgspec.Raw(b'{"alert":0}'))
    return [*lines[: place + 1], encode(forged), *lines[place + 1 :]]


def replaced(lines, place):
    """A record of the forger's in the place of one, and the next made to follow it."""
    record = parse(lines[place])
    forged = encode(Output(record.number, record.previous, record.wall, record.boot, msgspec.Raw(b'{"alert":0}')))
    result = [*lines[:place], forged, *lines[place + 1 :]]
    if place + 1 < len(lines):
        following = parse(lines[place + 1])
        result[place + 1] = encode(msgspec.structs.replace(following, previous=digest(forged)))
    return result


FIRST = {edited: 0, payload_edited: 0, without: 1, cut_from: 1, swapped: 1, doubled: 0, invented: 0, replaced: 1}
"""Where it can be done at the earliest: without a start there is nothing to audit, which another test sees to."""


EXPECTED = {cut_from: {"cut"}, without: {"forged", "cut"}, replaced: {"forged", "cut"}}
"""A crash explains that the end is not there; nothing else."""


@pytest.mark.parametrize("change", FIRST)
def test_every_single_change_shows_wherever_it_is_made(change, monkeypatch):
    """1,000 audits of 1,000 records take some seconds, though each line is parsed once."""
    monkeypatch.setattr(auditing, "parse", lru_cache(None)(parse))
    lines, missed, severity = Log().record(COUNT), [], set()
    places = [place for place in range(FIRST[change], COUNT) if not (change is swapped and place == COUNT - 1)]
    for place in places:
        faults = audited(change(lines, place)).faults
        worst = {fault.severity for fault in faults} & {"forged", "cut"}
        severity |= {min(worst, default="missed", key="forged cut".find)}
        if not worst:
            missed.append(place)
    assert missed == []
    assert severity <= EXPECTED.get(change, {"forged"})


def test_every_byte_counts():
    lines = Log().record(8, every=3)
    for place, line in enumerate(lines[1:], 1):
        for byte in range(0, len(line), 3):
            changed = line[:byte] + bytes([line[byte] ^ 1]) + line[byte + 1 :]
            assert "forged" in severities([*lines[:place], changed, *lines[place + 1 :]]), (place, byte)


def test_a_cut_says_from_when_nothing_is_known_and_what_is_under_no_signature():
    log = Log()
    log.begin()
    log.add(b"1")
    log.checkpoint()
    log.add(b"2")
    log.add(b"3")
    found = audited(log.lines())
    assert [fault.severity for fault in found.faults] == ["cut"]
    assert "nothing is known after 2026-06-01 12:00:35" in what(found)
    assert "No signature covers the last 2 records" in what(found)
    assert (found.records, found.signed) == (5, 3)


def test_who_takes_the_process_over_cannot_change_what_was_closed():
    """Its key is the one that signs next; those before it are gone from the chain once the writer has taken them."""
    log = Log()
    chain = log.begin()
    log.add(b'{"alert":1}')
    log.checkpoint()
    past = log.lines()
    stolen = chain.last.key
    assert len(chain._links) == 1
    record = parse(past[1])
    forged = encode(msgspec.structs.replace(record, json=msgspec.Raw(b'{"alert":0}')))
    closing = parse(past[2])
    assert isinstance(closing, Checkpoint)
    closing = msgspec.structs.replace(closing, previous=digest(forged), signature=b"")
    closing = msgspec.structs.replace(closing, signature=stolen.sign(signed_bytes(closing)))
    found = audited([past[0], forged, encode(closing)])
    assert "forged 2: Its signature is not by the key that is due." in what(found)


def test_a_heartbeat_signs_and_silence_shows():
    log = Log()
    chain = log.begin(heartbeat=10)
    chain.close_until_now(Heartbeat, *log.now())
    log.boot += 60_000_000
    log.add(b"1")
    log.end()
    found = audited(log.lines())
    assert what(found) == "note 2: There was silence for 61 s."


def test_a_wall_clock_that_is_moved_shows_and_time_does_not_go_back():
    log = Log()
    chain = log.begin()
    wall, boot = log.now()
    chain.add(Output, wall - 3_600_000_000, boot, json=b"1")
    log.add(b"2")
    log.end()
    assert what(audited(log.lines())) == (
        "note 1: The wall clock was moved by -3,600.0 s. / note 2: The wall clock was moved by +3,600.0 s."
    )
    log.begin()
    log.boot -= 20_000_000
    log.add(b"1")
    assert "forged 1: Its time since the boot is before" in what(audited(log.lines()))


def test_dropped_records_are_told():
    log = Log()
    chain = log.begin()
    chain.gap(17, *log.now())
    log.end()
    found = audited(log.lines())
    assert (found.dropped, {fault.severity for fault in found.faults}) == (17, {"note"})


def test_an_end_that_the_hardware_did_not_certify_is_no_proof_of_the_count():
    log = Log()
    chain = log.begin()
    chain.end(None, "TPM_ABSENT", *log.now())
    found = audited(log.lines())
    assert [fault.severity for fault in found.faults] == ["cut"]
    assert "TPM_ABSENT" in what(found)
    with pytest.raises(ClosedError):
        chain.close_until_now(Checkpoint, 0, 0)


@pytest.mark.parametrize("whose", ["start", "end"])
def test_hardware_that_the_license_is_not_bound_to_certifies_nothing(whose):
    other, log = Signer(), Log()
    log.begin()
    lines = log.lines()
    if whose == "start":
        start = parse(lines[0])
        assert isinstance(start, Start)
        unsigned = msgspec.structs.replace(start, certificate=other.certify(start.statement), signature=b"")
        signed = msgspec.structs.replace(unsigned, signature=log.chain.last.key.sign(signed_bytes(unsigned)))
        lines = [encode(signed)]
    else:
        log.chain.end(other.certify(log.chain.closing()), None, *log.now())
        lines += [link.line for link in log.chain.take()]
    assert "certified by a token that the license is not bound to" in what(audited(lines))


def test_a_certificate_for_another_statement_is_none():
    log = Log()
    log.begin()
    start = parse(log.lines()[0])
    assert isinstance(start, Start)
    said = msgspec.structs.replace(start.statement, recording=9, previous=b"x" * 32)
    unsigned = msgspec.structs.replace(start, statement=said, previous=b"x" * 32, signature=b"")
    signed = msgspec.structs.replace(unsigned, signature=log.chain.last.key.sign(signed_bytes(unsigned)))
    assert "signature is not over what the recording says" in what(audited([encode(signed)]))


def test_a_recording_of_another_license_is_not_believed():
    log = Log()
    log.begin(license="1" * 32)
    assert "which was not given" in what(audited(log.lines()))
    log.begin(package="1" * 32)
    assert "a vendor or a package that the license does not" in what(audited(log.lines()))


# ---- several recordings


def several(count: int = 3) -> list[list[bytes]]:
    log = Log()
    return [log.record(6) for _ in range(count)]


def ordered(recordings: list[list[bytes]], first: int = 1) -> list[str]:
    watched = {parse(lines[0]).previous for lines in recordings}
    found = [audited(lines, licensed(), watched) for lines in recordings]
    found.sort(key=lambda each: each.statement.recording)
    return [f"{fault.severity} {fault.recording}: {fault.what}" for fault in check_order(found, first)]


def test_recordings_follow_one_another():
    recordings = several()
    assert ordered(recordings) == []
    assert ordered(recordings[1:]) == ["cut 2: Not given: recording 1."]
    assert ordered(recordings[1:], first=2) == []
    assert "cut 3: Recording 4, which is due, was not given." in ordered(recordings, first=4)
    assert ordered([recordings[0], recordings[2]]) == ["forged 3: Missing: recording 2."]


@pytest.mark.parametrize("given", [slice(1), slice(2), slice(1, 3), slice(4)])
def test_recordings_of_numbers_that_were_verified_before_show(given):
    """A device that was set back makes them anew, up to one that is due: all of it fits together."""
    said = ordered(several(4)[given], first=3)
    below = [number for number in range(1, 5)[given] if number < 3]
    assert [line.partition(":")[0] for line in said if "below the first" in line] == [f"forged {n}" for n in below]


def test_a_recording_that_was_cut_after_the_next_began_shows():
    one, two, _ = several()
    assert "forged 2: It follows a record that the recording before it does not have" in ordered([one[:-1], two])[0]


def test_records_added_after_the_next_began_show():
    log = Log()
    log.begin()
    log.add(b"1")
    one = log.lines()
    two = log.record(4)
    assert ordered([one, two]) == []
    late = Output(2, digest(one[-1]), parse(one[-1]).wall, parse(one[-1]).boot, msgspec.Raw(b"2"))
    assert "records that were added when this one had begun" in ordered([[*one, encode(late)], two])[0]


def test_a_device_whose_state_was_set_back_shows():
    log = Log()
    one = log.record(4)
    log.recording, head = 0, log.head
    log.head = bytes(32)
    again = log.record(4)
    assert "forged 1: There are two recordings with this number" in ordered([one, again])[0]
    assert head != log.head


def test_an_anchor_and_a_revision_go_up():
    log, recordings = Log(), []
    for steps, revision in ((5, 2), (4, 2), (9, 1)):
        log.begin(steps=steps, revision=revision)
        log.end()
        recordings.append(log.lines())
    said = " ".join(ordered(recordings))
    assert "forged 2: The count of the license's anchor is less" in said
    assert "forged 3: It is of an earlier revision" in said


# ---- sensors


def der(key):
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


P256, ED25519 = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
SIGNATURES = {"camera": P256.sign(b"a frame", ec.ECDSA(hashes.SHA256())), "radar": ED25519.sign(b"a frame")}
KEYS = {"camera": der(P256.public_key()), "radar": der(ED25519.public_key())}


@pytest.mark.parametrize("name", KEYS)
def test_a_sensors_signature_is_verified_when_it_comes(name):
    sensor = Sensor(name, KEYS[name])
    assert sensor.check(b"a frame", SIGNATURES[name]).sensor == name
    for content, signature in ((b"another", SIGNATURES[name]), (b"a frame", bytes(64)), (b"a frame", b"")):
        with pytest.raises(DamagedError):
            sensor.check(content, signature)


@pytest.mark.parametrize("key", [b"", b"x" * 91, der(ec.generate_private_key(ec.SECP384R1()).public_key())])
def test_only_two_kinds_of_keys_are_for_sensors(key):
    with pytest.raises(UsageError):
        Sensor("camera", key)


def test_a_sensors_signature_is_verified_again_where_that_takes_no_more_than_the_digest():
    log = Log()
    chain = log.begin(sensors=KEYS)
    for name, key in KEYS.items():
        signed = Sensor(name, key).check(b"a frame", SIGNATURES[name])
        chain.add(Input, *log.now(), input=digest(b"a frame"), sensor=signed)
    signed = Sensor("camera", KEYS["camera"]).check(b"a frame", SIGNATURES["camera"])
    chain.add(Output, *log.now(), json=b"1", input=digest(b"another"), sensor=signed)
    log.end()
    assert what(audited(log.lines())) == "forged 3: It has a signature that is not of the sensor that it names."


# ---- lines


@given(st.binary(max_size=200))
def test_what_is_no_record_is_refused(raw):
    with pytest.raises(DamagedError):
        parse(raw)


LINES = Log().record(7, every=3)


@given(st.sampled_from(LINES), st.integers(0, 2000), st.binary(max_size=4))
def test_what_is_parsed_is_in_its_one_encoding(line, place, put):
    changed = line[:place] + put + line[place + len(put) :]
    try:
        record = parse(changed)
    except DamagedError:
        return
    assert encode(record) == changed


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(VALUES)
def test_any_json_value_is_recorded_as_it_is_or_refused(value):
    try:
        json = msgspec.json.encode(value)
    except (ValueError, msgspec.MsgspecError):  # lone surrogates
        return
    if plain_json(json):
        log = Log()
        log.begin()
        log.add(json)
        log.end()
        found = parse(log.lines()[1])
        assert isinstance(found, Output)
        assert bytes(found.json) == json  # type: ignore[arg-type]  # Raw is a buffer


@pytest.mark.parametrize(
    "line",
    [
        LINES[1].replace(b'"json":{', b'"json":{"alert":1,'),
        LINES[1].replace(b'"json":{', b'"json":{ '),
        LINES[1].replace(b'"json":', b'"data":"YQ==","json":'),
        LINES[1].replace(b"{", b'{"more":1,', 1),
        LINES[1].replace(b'"kind":"record"', b'"kind":"other"'),
        LINES[0].replace(b'"schema":1', b'"schema":2'),
        b"x" * (LINE_LIMIT + 1),
        LINES[1] + b" ",
    ],
)
def test_odd_lines_are_refused(line):
    with pytest.raises(DamagedError):
        parse(line)


def test_the_largest_record_fits_into_a_line():
    log = Log()
    log.begin(sensors={f"{number:0200}": bytes(4096) for number in range(10)})
    log.chain.add(Output, *log.now(), data=bytes(PAYLOAD_LIMIT), input=bytes(32))
    for line in log.lines():
        assert encode(parse(line)) == line


def test_a_chain_that_is_interrupted_is_whole():
    """All that the next record takes is put in place in one step."""
    chain = Chain(bytes(32))
    before = chain.last
    with pytest.raises(TypeError):
        chain.add(Output, *Log().now(), json=object())  # type: ignore[arg-type]  # on purpose
    assert chain.last is before


def test_an_end_is_the_end():
    lines = Log().record(5)
    assert isinstance(parse(lines[-1]), End)
    assert "after the end, was added" in what(audited([*lines, lines[-2]]))
    assert SIGNER.public


def test_no_number_of_lesser_faults_hides_a_worse_one():
    audit: Any = auditing.Audit.__new__(auditing.Audit)
    audit._faults, audit._statement = [], SimpleNamespace(recording=1)
    for severity in ("note", "cut", "forged"):
        for number in range(2 * auditing.FAULT_LIMIT):
            audit._fault(severity, number, "here", "it is so")
    assert {fault.severity for fault in audit._faults} == {"note", "cut", "forged"}
    assert len(audit._faults) == 3 * auditing.FAULT_LIMIT


def test_a_missing_license_is_no_forgery_and_hides_none():
    log = Log()
    log.begin(revision=2)
    log.add(b'"intruder"')
    lines = log.lines()
    assert {fault.severity for fault in audited(lines).faults} == {"unjudged", "cut"}
    lines[1] = lines[1].replace(b"intruder", b"visitors")
    lines.append(b"")
    assert "forged" in {fault.severity for fault in audited(lines).faults}


def test_what_an_editor_did_is_named():
    log = Log()
    log.begin()
    log.add(b"1")
    lines = log.lines()
    assert "it ends in CRLF" in what(audited([lines[0], lines[1] + b"\r"]))
    assert "it is empty" in what(audited([*lines, b""]))
