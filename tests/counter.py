"""A vendor and its customers at the command line, with simulated hardware around it, and a person at a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import termios
import time
from typing import TYPE_CHECKING

from tests.world import MEMBERS, PROGRAM, TERMS, run

if TYPE_CHECKING:
    from pathlib import Path

ANY = TERMS + '[require]\nbindings = "any"\n'
WATCHED = TERMS + '[presence]\ninterval = "1s"\ngrace = "30s"\nanswers = 20\n'


def make_shop(folder: Path) -> Path:
    """A vendor's folder with a package."""
    for name, content in MEMBERS.items():
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / name).write_bytes(content)
    run("vendor", "init", folder / "vendor", "--name", "Acme", "--no-passphrase")
    pack = ("vendor", "pack", "--vendor", folder / "vendor", "--name", "reader", "--version", "1.0")
    run(*pack, "-o", folder / "model.hwpkg", folder / "files")
    return folder


def enter(made, folder, patch):
    """A copy, in which commands run."""
    subprocess.run(["cp", "-a", f"{made}/.", folder], check=True)
    (folder / "pin").write_text("123456\n")
    (folder / "wrong").write_text("000000\n")
    for name in ("HWLICENSE_TOKEN", "HWLICENSE_USB", "HWLICENSE_TPM", "HWLICENSE_HOME"):
        patch.delenv(name, raising=False)
    patch.chdir(folder)
    return folder


_TOKEN = 'hwlicense vendor token enroll --vendor vendor --token "$HWLICENSE_TOKEN" --pin-file pin -o NAME.hwreq'
PIECES = {
    "dongle": (["--dongle", "--dongle-blank"], "hwlicense vendor dongle program --vendor vendor -o NAME.hwreq"),
    "enrolled": (["--dongle"], "hwlicense vendor dongle enroll --vendor vendor --answers 30 -o NAME.hwreq"),
    "token": (["--token"], f"{_TOKEN} --new-key p256"),
    "rsa": (["--token"], f"{_TOKEN} --new-key rsa2048"),
    "tpm": (["--tpm"], 'hwlicense device enroll --home enrolled --tpm "$HWLICENSE_TPM" -o NAME.hwreq'),
}
"""By name: how it is simulated, and what makes a request for it."""


def simulate(kinds, *command, state="kept", status=0, **options):
    return run("simulate", *kinds, "--state", state, "--", *command, status=status, **options)


def prepare(kind, name=None):
    """At the order desk: a request for new hardware, which is kept in the folder of this name."""
    name = name or kind
    options, command = PIECES[kind]
    simulate(options, "sh", "-ec", command.replace("NAME", name), state=name)
    return f"{name}.hwreq"


def issue(*requests, terms=TERMS, more=(), status=0, out="a.hwlic"):
    with open("terms.toml", "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(terms)
    given = [word for request in requests for word in ("--request", request)]
    rest = ("--package", "model.hwpkg", "--terms", "terms.toml", *more, "-o", out)
    return run("vendor", "issue", "--vendor", "vendor", *given, *rest, status=status)


def deliver(options, state, out="a.hwlic"):
    run("device", "trust", "--home", "home", "vendor/vendor.pub.json")
    return simulate(options, "hwlicense", "device", "install", "--home", "home", out, state=state)


CHECK = ("hwlicense", "device", "check", "--open", "--home", "home", "model.hwpkg")


def told(done, reason):
    """One error with its reason and a hint, and nothing on standard output but JSON that was asked for."""
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "reason: ", "hint: "))]
    assert [line.split(":")[0] for line in lines] == ["error", "reason", "hint"], done.stderr
    assert lines[1] == f"reason: {reason}"
    if "--json" in done.args:
        shown = json.loads(done.stdout)["error"]
        assert shown["reason"] == reason
        assert f"error: {shown['what']}" == lines[0]
        assert f"hint: {shown['hint']}" == lines[2]
    else:
        assert done.stdout == ""
    return lines[0]


class Terminal:
    """A command at a terminal of its own, as a person sees it."""

    def __init__(self, *command):
        ours, theirs = pty.openpty()
        self.fd, self.shown = ours, ""
        self.process = subprocess.Popen(
            [PROGRAM, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(theirs)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)

    def until(self, pattern, seconds=20):
        """What was shown up to what matches."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown
            self._read(0.1)
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, text):
        time.sleep(0.1)  # the prompt comes before the terminal has stopped echoing
        os.write(self.fd, text.encode())

    def end(self):
        """The rest, and the exit status."""
        while self._read(20):
            pass
        return self.shown, self.process.wait(20)

    def _read(self, seconds):
        if not select.select([self.fd], [], [], seconds)[0]:
            return False
        try:
            self.shown += os.read(self.fd, 4096).decode().replace("\r", "")
        except OSError:  # nobody has the other end any more
            return False
        return True
