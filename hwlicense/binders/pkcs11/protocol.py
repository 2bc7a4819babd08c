"""What the application and a module's process say to each other.

A message is two sizes (4 bytes each, big-endian), a JSON text of the first size and secret bytes of the second. The
secret part alone holds PINs and what tokens computed, so that neither ends in a string that cannot be overwritten. Both
sides refuse what is larger than the limits or not as the schemas say: the process belongs to the module's maker, and
whatever it sends, the worst that comes of it is an error.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

import msgspec

from hwlicense.core.documents import Mechanism  # as the next
from hwlicense.core.schema import Blob  # noqa: TC001  # msgspec reads the annotations at run time
from hwlicense.core.uri import TokenUri

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

TEXT_LIMIT: Final = 256 << 10
SECRET_LIMIT: Final = 4096
"""Bytes. A PIN has tens, an RSA plaintext 512 at most."""

TOKEN_LIMIT: Final = 64
KEY_LIMIT: Final = 64
CERTIFICATE_LIMIT: Final = 16
CERTIFICATE_SIZE: Final = 4096
LABEL_LIMIT: Final = 64
IDENTIFIER_LIMIT: Final = 64

LOGIN_REQUIRED: Final = 0x4
TOKEN_INITIALIZED: Final = 0x400
PIN_COUNT_LOW: Final = 0x10000
PIN_FINAL_TRY: Final = 0x20000
PIN_LOCKED: Final = 0x40000
"""CKF_* of a token (PKCS#11 v2.40 base, 3.2, CK_TOKEN_INFO)."""

ANSWER_INVALID: Final = "ANSWER_INVALID"
"""A code that is no CKR_: what the module gave makes no sense."""

LAST_TRY_UNSEEN: Final = "LAST_TRY_UNSEEN"
"""Another one: the PIN was not tried. It would be the last try by now, which whoever gave it could not know."""

_SIZES: Final = struct.Struct(">II")

Text = Annotated[str, msgspec.Meta(max_length=LABEL_LIMIT)]
Code = Annotated[str, msgspec.Meta(pattern="^[A-Z][A-Z0-9_]{0,63}$")]
Operation = Mechanism | Literal["ecdsa"]
"""What a key is asked to do."""

Natural = Annotated[int, msgspec.Meta(ge=0)]
Identifier = Annotated[bytes, msgspec.Meta(max_length=IDENTIFIER_LIMIT)]
NewKey = Literal["p256", "rsa2048", "rsa3072"]
Ability = Literal["ECDH1_DERIVE", "RSA_PKCS_OAEP", "EC_KEY_PAIR_GEN", "RSA_PKCS_KEY_PAIR_GEN"]
"""Mechanisms that matter here, by their names without CKM_."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what messages consist of."""


class Place(Part, frozen=True):
    """A token in a slot. Neither alone says which it is: tokens change slots, and cheap ones have no serial number."""

    slot: Natural
    label: Text
    manufacturer: Text
    model: Text
    serial: Text

    @property
    def uri(self) -> TokenUri:
        """What a URI says of it. Left out is what no URI can say, and what says nothing."""
        texts = self.manufacturer, self.model, self.serial, self.label
        manufacturer, model, serial, label = (text if text and "\0" not in text else None for text in texts)
        return TokenUri(manufacturer, model, serial, label)


class TokenState(Part, frozen=True):
    """A token as it was when it was looked at. `flags` are CKF_*."""

    place: Place
    flags: Natural
    abilities: Annotated[list[Ability], msgspec.Meta(max_length=4)]
    logged_in: bool


class KeyFound(Part, frozen=True):
    """A key on a token: SubjectPublicKeyInfo (DER), and what is known of its private half.

    `usable` is null where the private half is not seen without a login. `open`: it is used without one. `each_time`: it
    takes the PIN at each use (CKA_ALWAYS_AUTHENTICATE).
    """

    key: Blob
    label: Text
    identifier: Identifier
    usable: bool | None
    open: bool
    each_time: bool


# ---- requests --------------------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, tag_field="request"):
    """Base of the requests. `seconds` is when the application stops waiting, and the process soon after it."""

    seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)]


class Load(Request, frozen=True):
    """Load the module at this path. The first request."""

    path: str


class List(Request, frozen=True):
    """All tokens."""


class Look(Request, frozen=True):
    """Whether a token has the public half of `key`, without any login. `hint` says where to look first."""

    hint: TokenUri
    key: Blob


class Compute(Request, frozen=True):
    """What the private half of `key` makes of `encapsulated`, on any token but those to `skip`.

    With "ecdsa" that is a signature (r and s, 64 bytes) over a SHA-256.

    `login`: not to be tried before a login, though the key may show itself: what modules answer then has many names.
    The secret part, where it is not empty, is the PIN for a key that takes it at each use, on the token `pin_for`.
    `last_try`: whoever gave it knows that it is the last try.
    """

    hint: TokenUri
    key: Blob
    mechanism: Operation
    encapsulated: Blob
    login: bool
    skip: list[Place]
    pin_for: Place | None
    last_try: bool = False


class LogIn(Request, frozen=True):
    """Log in as the user; the secret part is the PIN. `last_try`: whoever gave it knows that it is the last try."""

    place: Place
    last_try: bool


class Inspect(Request, frozen=True):
    """The keys and certificates on a token."""

    place: Place


class Generate(Request, frozen=True):
    """Make a key pair that stays on the token."""

    place: Place
    kind: NewKey
    label: Text
    identifier: Identifier


AnyRequest = Load | List | Look | Compute | LogIn | Inspect | Generate

# ---- answers ---------------------------------------------------------------------------------------------


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, tag_field="answer"):
    """Base of the answers."""


class Done(Answer, frozen=True):
    """It was done."""


class Tokens(Answer, frozen=True):
    """The answer to List."""

    tokens: Annotated[list[TokenState], msgspec.Meta(max_length=TOKEN_LIMIT)]


class Seen(Answer, frozen=True):
    """The token is here; or, if `hidden`, one of that name that shows no keys without a login."""

    token: TokenState
    hidden: bool


class Absent(Answer, frozen=True):
    """No token that was not to be skipped has the key. `logins` is how many tokens the process is logged in to."""

    labels: Annotated[list[Text], msgspec.Meta(max_length=TOKEN_LIMIT)]
    logins: Natural


class Computed(Answer, frozen=True):
    """The secret part is what the token made of it."""

    place: Place


class PinNeeded(Answer, frozen=True):
    """Nothing was computed: this token takes its PIN first, at a login or (`each_time`) with the request."""

    token: TokenState
    each_time: bool


class Inspected(Answer, frozen=True):
    """The answer to Inspect. Certificates are X.509, DER, and nobody has looked into them."""

    token: TokenState
    keys: Annotated[list[KeyFound], msgspec.Meta(max_length=KEY_LIMIT)]
    certificates: Annotated[list[Blob], msgspec.Meta(max_length=CERTIFICATE_LIMIT)]


class Generated(Answer, frozen=True):
    """The public half of the new key."""

    key: Blob


class Failed(Answer, frozen=True):
    """`code` is a CKR_ without these letters, or one of this project's. `token` is how it is now, after a PIN try.

    `ending`: the process ends with this answer.
    """

    code: Code
    token: TokenState | None = None
    detail: Annotated[str, msgspec.Meta(max_length=300)] = ""
    ending: bool = False


AnyAnswer = Done | Tokens | Seen | Absent | Computed | PinNeeded | Inspected | Generated | Failed

REQUESTS: Final[msgspec.json.Decoder[AnyRequest]] = msgspec.json.Decoder(AnyRequest)
ANSWERS: Final[msgspec.json.Decoder[AnyAnswer]] = msgspec.json.Decoder(AnyAnswer)

# ---- on the wire -----------------------------------------------------------------------------------------

M = TypeVar("M")


def send(channel: socket.socket, message: msgspec.Struct, secret: bytearray | None = None) -> None:
    """Send a message. Raises ValueError for one above the limits, OSError."""
    text = msgspec.json.encode(message)
    secret = bytearray() if secret is None else secret
    if len(text) > TEXT_LIMIT or len(secret) > SECRET_LIMIT:
        raise ValueError("the message is too large")
    channel.sendall(_SIZES.pack(len(text), len(secret)) + text)
    channel.sendall(secret)


def receive(
    channel: socket.socket, decoder: msgspec.json.Decoder[M], wait: Callable[[], None] = lambda: None
) -> tuple[M, bytearray]:
    """A message, and its secret part for whoever asked to wipe. `wait` is called before each read.

    Raises EOFError at the end of the connection, ValueError for what is no message, OSError, and whatever `wait` does.
    """
    text_size, secret_size = _SIZES.unpack(_read(channel, _SIZES.size, wait))
    if text_size > TEXT_LIMIT or secret_size > SECRET_LIMIT:
        raise ValueError("the message is too large")
    text, secret = _read(channel, text_size, wait), _read(channel, secret_size, wait)
    try:
        return decoder.decode(text), secret
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        secret[:] = bytes(len(secret))
        raise ValueError("the message is not as its schema says") from error


def _read(channel: socket.socket, size: int, wait: Callable[[], None]) -> bytearray:
    data, at = bytearray(size), 0  # never grown: growing would leave copies behind
    try:
        with memoryview(data) as view:
            while at < size:
                wait()
                at += _some(channel, view[at:])
    except BaseException:
        data[:] = bytes(size)
        raise
    return data


def _some(channel: socket.socket, room: memoryview) -> int:
    if got := channel.recv_into(room):
        return got
    raise EOFError
