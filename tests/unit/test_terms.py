"""Terms: what is not enforced is not issued."""

import datetime
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwlicense.core.documents import Grant, PackageReference, Presence, grant_digest
from hwlicense.core.errors import HwlicenseError, Reason
from hwlicense.core.limits import Distances, Limits, Monitor, Rate, Regularity, Use
from hwlicense.core.process import CHECKS, Application, File, Guard
from hwlicense.core.schema import Document, decode, encode
from hwlicense.core.terms import parse_terms
from hwlicense.core.validity import check_validity

BASE = 'licensee = "Acme Robotics"\nproduct = "label-reader"\n'


WHOLE = {"opens": 2**32 - 1, "inferences": 2**53 - 1, "powered_on_hours": 1_000_000, "instances": 1024}
NO_LIMIT = ("0", "-1", "1.0", "true", "'1'", "[]", "inf", "nan", "-0", "9" * 400)
NO_RATE = (
    "0/day", "-1/day", "1.5/day", "1", "/day", "1/", "1/year", "1/Day", "1 / day", "1/0s", "1/367d", "1/1ms", "_/day",
    "9007199254740992/day", "1/99999999999s", "1/day/day", "", "\u0661/day", "1/\u0661s", "1/hour\\n",
)  # fmt: skip
NO_RATES = (
    '"1/day"', "[1]", '["1/day", "1/day"]', '["5/hour", "5/day"]', '["9/hour", "8/day"]', '["60/60s", "60/minute"]',
    str([f"{n}/{n}s" for n in range(1, 10)]),
)  # fmt: skip
NO_REQUIREMENT = (
    "anchor = 1", "anchor = 'yes'", "revocable = 0", "cap_pcr = 11", "cap_pcr = -1", "cap_pcr = 16", "cap_pcr = '11'",
    "anchor = true\ncap_pcr = 16", "revocable = true\ncap_pcr = 11",
    "anchor = true\ncap_pcr = 7\npcrs = ['sha256:0,7']",
)  # fmt: skip
NO_FEATURE = (
    "x = 1.5", "x = 2030-01-01", "x = []", "[features.x]", "'' = 1", f"{'x' * 201} = 1", "x = 9007199254740992",
    "x = -9007199254740992", f"x = '{'a' * 201}'", "\n".join(f"x{n} = 1" for n in range(101)),
)  # fmt: skip
NO_MONITOR = (
    "", "lasting = '1h'", "regularity = 1", "[monitor.other]", "lasting = '0s'\n[monitor.regularity]",
    "lasting = 60\n[monitor.regularity]", "throttled = '1/day'\n[monitor.regularity]",
    "[monitor.regularity]\naction = 'throttle'", "throttled = ''\n[monitor.regularity]\naction = 'throttle'",
    "throttled = '1/day'\n[monitor.regularity]\naction = 'deny'", "lasting = '367d'\n[monitor.regularity]",
)  # fmt: skip
NO_REGULARITY = (
    "action = 'stop'", "calls = 15", "calls = 4097", "variation = 0.0", "variation = 1.1", "variation = nan",
    "variation = inf", "variation = '1'", "pause = '0ms'", "pause = '0s'", "pause = '2d'", "pause = 5", "x = 1",
)  # fmt: skip
NO_DISTANCES = (
    "", "features = 0", "features = 257", "features = 8\nqueries = 19", "features = 8\nnormality = 0",
    "features = 8\nnormality = -nan", "features = 8\naction = 'deny '",
)  # fmt: skip

NO_GUARD = (
    "", "refuse = []", "refuse = 'none'", "refuse = ['all']", "refuse = ['debuggers']", "refuse = 1", "x = 1",
    *(f"refuse = 'all'\ninterval = {interval}" for interval in ("'0s'", "'61m'", "5", "'5'")),
)  # fmt: skip
NO_APPLICATION = (
    "", "files = {}", "files = []", "required = []",
    f"files = {{ a = '{'0' * 63}' }}", f"files = {{ a = '{'G' * 64}' }}",
    "files = { a = 1 }", f"required = ['b']\nfiles = {{ a = '{'0' * 64}' }}", f"files = {{ '' = '{'0' * 64}' }}",
    "[application.files]\n" + "\n".join(f"a{n} = '{'0' * 64}'" for n in range(4097)),
    f"files.{'a' * 501} = '{'0' * 64}'",
    f"x = 1\nfiles = {{ a = '{'0' * 64}' }}",
)  # fmt: skip


def refusal(text):
    with pytest.raises(HwlicenseError) as caught:
        parse_terms(text)
    assert caught.value.hint or "longer" in caught.value.what
    return caught.value.reason


def test_what_this_release_enforces():
    terms = parse_terms(
        BASE
        + "[validity]\nnot_before = 2026-12-01\nnot_after = 2027-12-31\n"
        + '[require]\npcrs = ["sha256:7,4"]\nbindings = "all"\n'
    )
    assert terms.validity.not_after == datetime.date(2027, 12, 31)
    assert str(terms.selection) == "sha256:4,7"
    assert str(parse_terms(BASE).selection) == ""


@pytest.mark.parametrize(
    "term",
    [
        "colour = 1",
        "[validity]\nuntil = 2027-12-31",
        "[limits]\nopenings = 3",
        "[require]\npcr = []",
        '[presence]\ninterval = "1s"\nx = 1',
    ],
)
def test_an_unknown_term_is_an_error(term):
    assert refusal(BASE + term + "\n") == Reason.TERM_UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "licensee = 3\nproduct = 'x'\n",
        "licensee = ''\nproduct = 'x'\n",
        "product = 'x'\n",
        BASE + "validity = 3\n",
        BASE + "limits = 3\n",
        BASE + "[presence]\n",
        BASE + "[presence]\ninterval = 10\n",
        BASE + "[presence]\ninterval = '0s'\n",
        BASE + "[presence]\ninterval = '10'\n",
        BASE + "[presence]\ninterval = '10 s'\n",
        BASE + "[presence]\ninterval = '-1s'\n",
        BASE + "[presence]\ninterval = '2d'\n",
        BASE + "[presence]\ninterval = '10s'\ngrace = '32d'\n",
        BASE + "[presence]\ninterval = '10s'\nregain = '1d'\n",
        BASE + "[presence]\ninterval = '10s'\nanswers = 0\n",
        BASE + "[presence]\ninterval = '10s'\nanswers = 16385\n",
        BASE + "[continuity]\nsession = '0h'\n",
        BASE + "[continuity]\n",
        BASE + "[continuity]\nsession = '367d'\n",
        BASE + "[require]\nbindings = 'both'\n",
        BASE + "[require]\nbindings = 0\n",
        BASE + "[require]\nbindings = 9\n",
        BASE + "[require]\nbindings = true\n",
        BASE + "[validity]\nnot_after = '2027'\n",
        BASE + "[validity]\nnot_after = 2027-12-31T00:00:00Z\n",
        BASE + "[validity]\nnot_before = 2027-12-31\nnot_after = 2027-12-30\n",
        BASE + "[require]\npcrs = 'sha256:7'\n",
        *[BASE + f"[limits]\n{key} = {value}\n" for key in WHOLE for value in NO_LIMIT],
        *[BASE + f"[limits]\n{key} = {most + 1}\n" for key, most in WHOLE.items()],
        *[BASE + f'[limits]\nrates = ["{rate}"]\n' for rate in NO_RATE],
        *[BASE + f"[limits]\nrates = {rates}\n" for rates in NO_RATES],
        *[BASE + f"[validity]\ndays_from_first_use = {days}\n" for days in (*NO_LIMIT, 36501)],
        *[BASE + f"[require]\n{term}\n" for term in NO_REQUIREMENT],
        *[BASE + f"[features]\n{term}\n" for term in NO_FEATURE],
        *[BASE + f"[monitor]\n{term}\n" for term in NO_MONITOR],
        *[BASE + f"[monitor.regularity]\n{term}\n" for term in NO_REGULARITY],
        *[BASE + f"[monitor.distances]\n{term}\n" for term in NO_DISTANCES],
        *[BASE + f"[guard]\n{term}\n" for term in NO_GUARD],
        *[BASE + f"[application]\n{term}\n" for term in NO_APPLICATION],
        BASE + BASE,
        "\0",
        "a = " + "[" * 30_000,
        "#" * 100_000,
    ],
)
def test_bad_terms(text):
    assert refusal(text) in {Reason.TERM_INVALID, Reason.TERM_UNKNOWN}


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ("[limits]\nopens = 'many'", "limits.opens must be a whole number, not text."),
        ("[limits]\nopens = 1.5", "limits.opens must be a whole number, not a number with a fraction."),
        ("[limits]\nopens = 0", "limits.opens must be at least 1."),
        ("[limits]\nopens = 5000000000", "limits.opens must be at most 4,294,967,295."),
        ("[limits]\nrates = '1/day'", "limits.rates must be a list, not text."),
        ("[limits]\nrates = ['1/day', 2]", "entry 2 of limits.rates must be text, not a whole number."),
        ("[limits]\nopenings = 3", "there is no term limits.openings."),
        ("colour = 1", "there is no term colour."),
        ("[presence]", "presence.interval is missing."),
        ("[require]\nbindings = true", "require.bindings must be a whole number or text, not true or false."),
        (
            "[validity]\nnot_after = 2030-01-01T00:00:00",
            "not_after must be a day, such as 2027-12-31, not a day with a",
        ),
        ("[features]\nx = [1]", "a value in features must be true or false or a whole number or text, not a list."),
        ("[features]\n'' = 1", "a name in features is empty."),
        ("[monitor.regularity]\naction = 'stop'", "monitor.regularity.action cannot be 'stop'."),
        ("limits = 3", "limits must be a table, not a whole number."),
        ("[require]\npcrs = [" + "'sha256:7'," * 9 + "]", "require.pcrs has too many entries: it takes at most 8."),
    ],
)
def test_what_is_wrong_is_said_in_peoples_words(term, words):
    with pytest.raises(HwlicenseError) as caught:
        parse_terms(BASE + term + "\n")
    assert words in caught.value.what
    assert "`" not in caught.value.what


@pytest.mark.parametrize(
    ("rate", "trouble", "hint"),
    [
        ("0/minute", "it allows nothing", "at least 1"),
        ("000/day", "it allows nothing", "at least 1"),
        ("10/fortnight", "there is no time frame 'fortnight'", "or a duration"),
        ("10/minutes", "there is no time frame 'minutes'", 'Did you mean "10/minute"?'),
        ("10/Day", "there is no time frame 'Day'", 'Did you mean "10/day"?'),
        ("10/min", "there is no time frame 'min'", 'Did you mean "10/minute"?'),
        ("10/hr", "there is no time frame 'hr'", 'Did you mean "10/hour"?'),
        ("10/h", "there is no time frame 'h'", 'Did you mean "10/hour"?'),
        ("10/", "it has no time frame", "second, minute, hour, day, week"),
        ("60 per minute", "it has no '/' between number and time frame", 'Did you mean "60/minute"?'),
        ("60 / minute", "it has spaces", 'Did you mean "60/minute"?'),
        ("60", "it has no '/' between number and time frame", "'/' and a time frame"),
        ("1.5/day", "'1.5' is no whole number", "'/' and a time frame"),
        ("-1/day", "'-1' is no whole number", "'/' and a time frame"),
        ("1,000/day", "'1,000' is no whole number", 'Did you mean "1000/day"?'),
        ("/day", "it has no number", "'/' and a time frame"),
        ("9007199254740992/day", "its number is above 9,007,199,254,740,991", "'/' and a time frame"),
        ("1/0s", "its time frame must be from 1 s to 366 d", "'/' and a time frame"),
        ("1/367d", "its time frame must be from 1 s to 366 d", "'/' and a time frame"),
    ],
)
def test_what_is_wrong_with_a_rate(rate, trouble, hint):
    with pytest.raises(HwlicenseError) as caught:
        parse_terms(f"{BASE}[limits]\nrates = ['{rate}']\n")
    assert caught.value.what == f"limits.rates has {rate!r}: {trouble}."
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("given", "trouble", "hint"),
    [
        ("10", "it has no unit", 'Did you mean "10s"?'),
        ("", "it is empty", "a whole number and a unit"),
        ("10 s", "it has spaces", 'Did you mean "10s"?'),
        ("10min", "there is no unit 'min'", 'Did you mean "10m"?'),
        ("2 hours", "there is no unit 'hours'", 'Did you mean "2h"?'),
        ("1w", "there is no unit 'w'", "a whole number and a unit"),
        ("2months", "there is no unit 'months'", "a whole number and a unit"),
        ("1.5h", "'1.5' is no whole number", "a whole number and a unit"),
        ("-1s", "'-1' is no whole number", "a whole number and a unit"),
        ("h", "it has no number", "a whole number and a unit"),
        ("2d", "it must be from 1 s to 1 d", "a whole number and a unit"),
        ("0s", "it must be from 1 s to 1 d", "a whole number and a unit"),
        ("99999999999s", "it must be from 1 s to 1 d", "a whole number and a unit"),
    ],
)
def test_what_is_wrong_with_a_duration(given, trouble, hint):
    with pytest.raises(HwlicenseError) as caught:
        parse_terms(f"{BASE}[presence]\ninterval = '{given}'\n")
    assert caught.value.what == f"presence.interval is {given!r}: {trouble}."
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("term", "hint"),
    [
        ("[limits]\ninference = 5", "Did you mean limits.inferences?"),
        ("[limits]\nrate = ['1/day']", "Did you mean limits.rates?"),
        ("inferences = 5", "Did you mean limits.inferences?"),
        ("[require]\ninstances = 5", "Did you mean limits.instances?"),
        ("[limit]\nopens = 5", "Did you mean [limits]?"),
        ("license = 'x'", "Did you mean licensee?"),
        ("[monitor]\naction = 'deny'", "Did you mean monitor.regularity.action or monitor.distances.action?"),
        ("[monitor.regular]", "Did you mean [monitor.regularity]?"),
        ("zzz = 5", "docs/terms.md"),
    ],
)
def test_a_term_that_was_meant_is_named(term, hint):
    with pytest.raises(HwlicenseError) as caught:
        parse_terms(BASE + term + "\n")
    assert caught.value.reason == Reason.TERM_UNKNOWN
    assert caught.value.hint.startswith(hint) or hint == "docs/terms.md"
    assert "docs/terms.md" in caught.value.hint
    assert "Did you mean" in caught.value.hint or hint == "docs/terms.md"


@pytest.mark.parametrize(
    ("term", "hint"),
    [
        ("[limits]\nopens = '1000'", "without quotes"),
        ("[limits]\ninferences = 1e6", "1_000_000"),
        ("[limits]\ninferences = 0", "Leave the term out where nothing is to be limited."),
        ("[limits]\ninstances = 1025", "Leave the term out where nothing is to be limited."),
        ("[limits]\nrates = '1/day'", 'in brackets: ["..."]'),
        ("[limits]\nopens = 1,000", "_ between thousands"),
        ("[presence]\ninterval = 10", 'in quotes; a duration has a unit, such as "10s"'),
        ("[validity]\nnot_after = '2027-12-31'", "without quotes"),
        ("[require]\nanchor = 'yes'", "true or false, without quotes"),
        ("[monitor.regularity]\naction = 'stop'", '"flag", "throttle" or "deny"'),
        ("[guard]\nrefuse = ['debuggers']", 'Write "all" or a list of "debugger", "tracing"'),
        ("[application.files]\nlicensee = 'A'", "put other terms before"),
    ],
)
def test_how_a_wrong_value_is_mended(term, hint):
    with pytest.raises(HwlicenseError) as caught:
        parse_terms(BASE + term + "\n")
    assert caught.value.reason == Reason.TERM_INVALID
    assert hint in caught.value.hint


def test_all_of_use_is_granted():
    terms = parse_terms(
        BASE
        + "[validity]\ndays_from_first_use = 30\n"
        + "[require]\nanchor = true\nrevocable = true\ncap_pcr = 11\n"
        + "[limits]\nopens = 1000\ninferences = 1_000_000\nrates = ['100/hour', '1_000/day', '5/90s', '1900/2d']\n"
        + "powered_on_hours = 8760\ninstances = 2\n"
        + "[features]\nlanguage = 'en'\ncameras = 4\noverlay = true\n"
        + "[monitor]\nlasting = '2h'\nthrottled = '10/minute'\n"
        + "[monitor.regularity]\naction = 'throttle'\ncalls = 300\nvariation = 0.2\npause = '500ms'\n"
        + "[monitor.distances]\nfeatures = 16\naction = 'deny'\nqueries = 200\nnormality = 0.85\n"
    )
    rates = [Rate(100, 3600), Rate(1000, 86400), Rate(5, 90), Rate(1900, 2 * 86400)]
    monitor = Monitor(7200, Regularity(300, 200, 500, "throttle"), Distances(200, 850, 16, "deny"), Rate(10, 60))
    use = Use(
        limits=Limits(1000, 1_000_000, rates, 8760, 2),
        days=30,
        features={"language": "en", "cameras": 4, "overlay": True},
        monitor=monitor,
        anchor=True,
        revocable=True,
        cap=11,
    )
    assert terms.granted_use == use
    assert use.metered
    assert use.counted


def test_what_is_said_of_the_process_is_granted():
    files = {"/opt/app.py": "00" * 32, "/usr/bin/python3": "ff" * 32}
    measured = "\n".join(f'"{name}" = "{digest}"' for name, digest in files.items())
    terms = parse_terms(
        BASE
        + '[guard]\nrefuse = ["swap", "debugger", "swap"]\ninterval = "2m"\n'
        + f'[application]\nrequired = ["/opt/app.py"]\n[application.files]\n{measured}\n'
    )
    assert terms.granted_guard == Guard(["debugger", "swap"], 120)
    assert terms.granted_application == Application(
        [File("/opt/app.py", bytes(32), required=True), File("/usr/bin/python3", b"\xff" * 32)]
    )
    assert parse_terms(BASE + "[guard]\nrefuse = 'all'\n").granted_guard == Guard(list(CHECKS), 5)
    assert encode(File("a", bytes(32))) == encode(File("a", bytes(32), required=False))


@pytest.mark.parametrize(
    "table", ["", "[limits]\n", "[limits]\nrates = []\n", "[features]\n", "[require]\nanchor = false\n"]
)
def test_nothing_that_limits_use_leaves_the_grant_as_it_was(table):
    assert parse_terms(BASE + table).granted_use is None


def test_use_has_one_encoding():
    assert encode(Use()) == b'{"limits":{}}'
    assert msgspec.json.decode(b'{"days":3}', type=Use) == Use(days=3)
    for other in (
        b'{"days":3}',
        b'{"limits":{"rates":[]}}',
        b'{"limits":{},"anchor":false}',
        b'{"limits":{},"cap":null}',
    ):
        assert encode(msgspec.json.decode(other, type=Use)) != other


# ---- any terms that are accepted ---------------------------------------------------------------------------

UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
SECONDS = st.integers(1, 366 * 86400)
RATE = st.one_of(
    st.tuples(st.integers(1, 2**53 - 1), SECONDS).map(lambda r: (f"{r[0]}/{r[1]}s", Rate(*r))),
    st.tuples(st.integers(1, 2**53 - 1), st.sampled_from(list(UNITS))).map(
        lambda r: (f"{r[0]:_}/{r[1]}", Rate(r[0], UNITS[r[1]]))
    ),
)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=200)
FEATURES = st.dictionaries(
    TEXT.filter(bool), st.one_of(st.booleans(), st.integers(-(2**53) + 1, 2**53 - 1), TEXT), max_size=5
)
OPTIONAL = {
    "opens": st.integers(1, 2**32 - 1),
    "inferences": st.integers(1, 2**53 - 1),
    "powered_on_hours": st.integers(1, 1_000_000),
    "instances": st.integers(1, 1024),
}


def quoted(text):
    """As a basic string of TOML."""
    special = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(special.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


def written(value):
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(value) if isinstance(value, str) else str(value)


def granted(terms):
    package = PackageReference("a", "1", "33" * 16)
    return Grant(
        "11" * 16, 1, "22" * 32, terms.licensee, terms.product, 1, [package], datetime.date(2030, 1, 1),
        terms.validity.not_before, terms.validity.not_after, [], terms.granted_presence, terms.granted_continuity,
        terms.granted_use,
    )  # fmt: skip


class _License(Document, frozen=True):
    """`decode` wants a schema."""

    schema: int = 1
    grant: Grant | None = None


@given(
    st.fixed_dictionaries({}, optional=OPTIONAL),
    st.lists(RATE, max_size=8),
    FEATURES,
    st.none() | st.integers(1, 36500),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 15),
)
def test_accepted_terms_give_a_grant_that_is_read_as_it_was_written(
    limits, rates, features, days, anchor, revocable, cap
):
    text = BASE + f"[validity]\ndays_from_first_use = {days}\n" * (days is not None)
    text += f"[require]\nanchor = {written(anchor)}\nrevocable = {written(revocable)}\n"
    text += f"cap_pcr = {cap}\n" * (cap is not None)
    text += "[limits]\n" + "".join(f"{key} = {value}\n" for key, value in limits.items())
    text += f"rates = {[rate for rate, _ in rates]}\n[features]\n"
    text += "".join(f"{quoted(key)} = {written(value)}\n" for key, value in features.items())
    each = [(a, b) for i, (_, a) in enumerate(rates) for j, (_, b) in enumerate(rates) if i != j]
    idle = any(a.seconds <= b.seconds and a.count >= b.count for a, b in each)
    idle = idle or any(a.seconds > b.seconds and a.count >= b.count * math.ceil(a.seconds / b.seconds) for a, b in each)
    if idle or (cap is not None and not anchor and "opens" not in limits):
        assert refusal(text) == Reason.TERM_INVALID
        return
    grant = granted(parse_terms(text))
    document = _License(grant=grant)
    assert decode(encode(document), _License) == document
    use = grant.terms_of_use
    assert (use.features, use.days, use.cap) == (features, days, cap)
    assert use.limits.rates == [rate for _, rate in rates]
    assert {
        "powered_on_hours" if key == "hours" else key: getattr(use.limits, key)
        for key in ("opens", "inferences", "hours", "instances")
        if getattr(use.limits, key)
    } == limits
    assert use.counted == bool("opens" in limits or "powered_on_hours" in limits or anchor or revocable)
    assert len(grant_digest(grant)) == 32


@given(
    st.text(max_size=200),
    st.sampled_from(["limits", "require", "features", "monitor", "validity", "monitor.regularity"]),
)
def test_no_text_ends_in_anything_but_an_answer(text, table):
    try:
        terms = parse_terms(BASE + f"[{table}]\n{text}")
    except HwlicenseError as error:
        assert error.reason in {Reason.TERM_INVALID, Reason.TERM_UNKNOWN}  # noqa: PT017
    else:
        document = _License(grant=granted(terms))
        assert decode(encode(document), _License) == document


@given(
    st.dictionaries(
        st.sampled_from(
            ["lasting", "throttled", "action", "calls", "variation", "pause", "features", "queries", "normality"]
        ),
        st.one_of(
            st.integers(-5, 5000),
            st.floats(),
            st.sampled_from(["flag", "throttle", "deny", "10s", "500ms", "1/day", "366d", "", "0s"]),
            st.booleans(),
        ),
    ),
    st.sampled_from(["monitor.regularity", "monitor.distances"]),
)
def test_a_monitor_is_granted_whole_or_refused(values, table):
    outer = "".join(f"{key} = {toml(values[key])}\n" for key in ("lasting", "throttled") if key in values)
    inner = "".join(f"{key} = {toml(value)}\n" for key, value in values.items() if key not in ("lasting", "throttled"))
    try:
        terms = parse_terms(BASE + f"[monitor]\n{outer}[{table}]\n{inner}")
    except HwlicenseError as error:
        assert error.reason in {Reason.TERM_INVALID, Reason.TERM_UNKNOWN}  # noqa: PT017
        return
    document = _License(grant=granted(terms))
    assert decode(encode(document), _License) == document
    monitor = terms.granted_use.monitor
    throttles = "throttle" in {d.action for d in (monitor.regularity, monitor.distances) if d}
    assert throttles == (monitor.throttled is not None)


def toml(value):
    return repr(value).lower() if isinstance(value, float) else written(value)


# ---- presence, bindings, days ------------------------------------------------------------------------------


def test_presence_and_continuity_are_granted_in_seconds():
    table = "[presence]\ninterval = '10s'\ngrace = '5m'\nregain = '30d'\nrepeat = false\n[continuity]\nsession = '8h'\n"
    terms = parse_terms(BASE + table)
    assert terms.granted_presence == Presence(interval=10, grace=300, regain=30 * 86400, repeat=False)
    assert terms.granted_continuity == 8 * 3600
    assert parse_terms(BASE).granted_presence is None
    assert parse_terms(BASE).granted_continuity is None


@pytest.mark.parametrize(("bindings", "count", "need"), [('"all"', 3, 3), ('"any"', 3, 1), ("2", 3, 2), ("8", 8, 8)])
def test_how_many_bindings_it_takes(bindings, count, need):
    assert parse_terms(BASE + f"[require]\nbindings = {bindings}\n").require.need(count) == need


def test_more_bindings_than_there_are():
    with pytest.raises(HwlicenseError) as caught:
        parse_terms(BASE + "[require]\nbindings = 3\n").require.need(2)
    assert caught.value.reason == Reason.TERM_INVALID


@pytest.mark.parametrize("pcrs", ["sha1:7", "sha256:24", "sha256:7,7", "sha256", "sha256:x", ""])
def test_pcrs_that_select_nothing(pcrs):
    assert refusal(BASE + f'[require]\npcrs = ["{pcrs}"]\n') == Reason.USAGE


@pytest.mark.parametrize("index", [16, 21, 22, 23])
def test_pcrs_that_bind_to_nothing(index):
    assert refusal(BASE + f'[require]\npcrs = ["sha256:{index}"]\n') == Reason.PCR_UNUSABLE


def test_both_days_are_included():
    first, last = datetime.date(2026, 12, 1), datetime.date(2027, 12, 31)
    package = PackageReference("a", "1", "33" * 16)
    grant = Grant("11" * 16, 1, "22" * 32, "Acme", "p", 1, [package], first, first, last, [])
    for day in (first, last):
        check_validity(grant, day)
    one = datetime.timedelta(days=1)
    for day, reason in ((first - one, Reason.LICENSE_NOT_YET_VALID), (last + one, Reason.LICENSE_EXPIRED)):
        with pytest.raises(HwlicenseError) as caught:
            check_validity(grant, day)
        assert caught.value.reason == reason
