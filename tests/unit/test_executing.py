"""When the command line asks for PINs around a program that it runs."""

from threading import Event

from hwlicense.cli.executing import _until
from hwlicense.core.secret import Secret
from tests.forging import refused


def test_no_pin_is_asked_for_once_the_terminal_is_the_programs():
    asked = []

    def source(prompt, /, *, last_try=False):
        asked.append((prompt, last_try))
        return Secret(bytearray(b"123456"))

    started = Event()
    ask = _until(started, source)
    assert bytes(ask("PIN", last_try=True).buffer) == b"123456"
    started.set()
    with refused("PIN_NEEDED", words="COMMAND's by now"):
        ask("PIN")
    assert asked == [("PIN", True)]
