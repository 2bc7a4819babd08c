"""PKCS#11 URIs: what they name, and what no file and no person may put into them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwlicense.core.errors import UsageError
from hwlicense.core.uri import TokenUri

# RFC 7512, section 3, with its line breaks taken out
PUBLISHED = {
    "pkcs11:": TokenUri(),
    "pkcs11:object=my-pubkey;type=public": TokenUri(object="my-pubkey"),
    "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0;"
    "object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial=": TokenUri(
        "Snake Oil, Inc.",
        "1.0",
        "",
        "The Software PKCS#11 Softtoken",
        "my-certificate",
        bytes.fromhex("69953e5cf4bdec91"),
    ),
    "pkcs11:token=Software%20PKCS%2311%20softtoken;manufacturer=Snake%20Oil,%20Inc.": TokenUri(
        "Snake Oil, Inc.", token="Software PKCS#11 softtoken"
    ),
    "pkcs11:library-manufacturer=Snake%20Oil,%20Inc.;library-description=Soft%20Token%20Library;"
    "library-version=1.23": TokenUri(),
    "pkcs11:token=%4Dy%20token%25%20created%20by%20Joe;id=%01%02%03%Ba%dd%Ca%fe%04%05%06": TokenUri(
        token="My token% created by Joe", id=bytes.fromhex("010203baddcafe040506")
    ),
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_examples(text):
    assert TokenUri.parse(text) == PUBLISHED[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "token=x",
        "PKCS11:token=x",
        " pkcs11:token=x",
        "pkcs11:token",
        "pkcs11:token=x;token=y",
        "pkcs11:colour=red",
        "pkcs11:token=%zz",
        "pkcs11:token=%ff",
        "pkcs11:token=%00",
        "pkcs11:token=a b",
        "pkcs11:?module-path=relative.so",
        "pkcs11:?module-name=softhsm",
        "pkcs11:?x-other=1",
        "pkcs11:token=" + "x" * 1000,
    ],
)
def test_what_is_none(text):
    with pytest.raises(UsageError) as caught:
        TokenUri.parse(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "pkcs11:?pin-value=4711",
        "pkcs11:?pin-source=file:/4711",
        "pkcs11:token=x?module-path=/m.so&pin-value=4711",
        "PKCS11:token=x?pin-value=4711",
        " pkcs11:?pin-value=4711",
        "pkcs11:pin-value=4711;x",
        "pkcs11:token=%zz;pin-value=4711",
        "pkcs11:pin%2Dvalue=4711",
    ],
)
def test_no_pin_is_taken_nor_repeated(text):
    with pytest.raises(UsageError) as caught:
        TokenUri.parse(text)
    assert "4711" not in caught.value.what + caught.value.hint


@pytest.mark.parametrize("query", ["?", "?module-path=/evil.so", "?pin-value=1", "?pin-source=|cmd"])
def test_a_hint_from_a_file_has_no_query(query):
    assert TokenUri.parse_hint("pkcs11:token=x") == TokenUri(token="x")
    with pytest.raises(UsageError):
        TokenUri.parse_hint("pkcs11:token=x" + query)


texts = st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(texts, texts, texts, texts, texts, st.none() | st.binary(max_size=20), st.none() | texts)
def test_what_is_written_is_read(manufacturer, model, serial, token, name, identifier, module):
    uri = TokenUri(manufacturer, model, serial, token, name, identifier, None if module is None else "/" + module)
    assert TokenUri.parse(str(uri)) == uri


@given(st.text(max_size=60))
def test_nothing_but_errors_of_the_tree(text):
    for attempt in (text, "pkcs11:" + text, "pkcs11:?" + text):
        try:
            TokenUri.parse(attempt)
        except UsageError:
            continue
