"""Tokens and dongles: opening beside pkcs11-tool, pulls, load, and a module that fails at each of its calls."""

from __future__ import annotations

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import hwlicense
import hwlicense_simulators
from benchmarks.measure import Summary, in_turn, run
from hwlicense_simulators import Bus, Dongle, Reader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.scene import Scene
    from hwlicense_simulators import Token

PIN: Final = "123456"
INTERVAL: Final = 1
PLAIN: Final = 'licensee = "Acme Robotics"\nproduct = "reader"\n'
TERMS: Final = f'{PLAIN}[presence]\ninterval = "{INTERVAL}s"\nanswers = 16000\n'
THREADS, PROCESSES = 12, 4
BENCHES: Final = 12
NETWORK: Final = "network.onnx"


class Bound:
    """A license for one token or dongle, installed in a home of its own, and how it is opened."""

    def __init__(self, scene: Scene, name: str, enroll: list[str], terms: str, environment: dict[str, str]) -> None:
        self.scene, self.environment, self.home = scene, environment, scene.folder / f"home-{name}"
        request, licensed, table = (scene.folder / f"{name}.{end}" for end in ("hwreq", "hwlic", "toml"))
        table.write_text(terms)
        self.run("vendor", *enroll, "--vendor", scene.vendor, "-o", request)
        issue = ("--request", request, "--package", scene.package, "--terms", table, "-o", licensed)
        self.run("vendor", "issue", "--vendor", scene.vendor, *issue)
        self.run("device", "trust", "--home", self.home, scene.vendor / "vendor.pub.json")
        self.run("device", "install", "--home", self.home, licensed)
        self.vendor = scene.vendor_text

    def run(self, *arguments: str | Path) -> None:
        """A command, untimed."""
        run(self.scene.command(*arguments), self.environment)

    def open(self, token: str | None = None) -> hwlicense.Model:
        """In this process."""
        return hwlicense.open(
            self.scene.package, vendor=self.vendor, home=self.home, token=token, pin=lambda _prompt: PIN
        )


@contextmanager
def _token(scene: Scene, name: str, terms: str) -> Iterator[tuple[Reader, Token, Bound]]:
    pin = scene.folder / "pin"
    pin.write_text(PIN)
    with Reader() as reader:
        token = reader.token(pin=PIN)
        enroll = ["token", "enroll", "--token", token.uri, "--new-key", "p256", "--pin-file", str(pin)]
        yield reader, token, Bound(scene, name, enroll, terms, token.environment)


@contextmanager
def _dongle(scene: Scene, name: str, terms: str) -> Iterator[tuple[Dongle, Bound]]:
    bus = Bus()
    with bus.serve(), bus.installed(), Dongle(bus=bus, programmed=False) as dongle:
        # The installed environment does not see the simulators, which are a distribution of their own
        path = os.pathsep.join([bus.environment["PYTHONPATH"], str(Path(hwlicense_simulators.__file__).parents[1])])
        environment = {**bus.environment, "PYTHONPATH": path}
        yield dongle, Bound(scene, name, ["dongle", "program"], terms, environment)


def measure(scene: Scene, runs: int, pulls: int, seconds: float) -> dict[str, Any]:
    """All of it. `seconds` is how long the load lasts."""
    source = scene.folder / NETWORK
    source.write_bytes(_network())
    run(scene.pack(source))
    return {
        "opening": opening(scene, runs),
        "pulls": {kind: pulling(scene, kind, pulls) for kind in ("token", "dongle")},
        "load": load(scene, seconds),
        "faults": {kind: faults(scene, kind) for kind in ("crash", "hang")},
    }


def opening(scene: Scene, runs: int) -> dict[str, Any]:
    """Whole processes, in seconds."""
    with _token(scene, "opening", PLAIN) as (reader, token, bound):
        point = scene.folder / "point"
        listed = run(["pkcs11-tool", "--module", str(reader.module), "-O"], token.environment).output.decode()
        identifier = listed.partition("ID:")[2].split()[0]
        ephemeral = ec.generate_private_key(ec.SECP256R1()).public_key()
        point.write_bytes(ephemeral.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
        derive = ["--derive", "-m", "ECDH1-DERIVE", "--id", identifier, "-i", str(point), "-o", "/dev/null"]
        peer = ["pkcs11-tool", "--module", str(reader.module), "--login", "--pin", PIN, *derive]
        check = scene.command("device", "check", "--open", "--home", bound.home, "--pin-file", scene.folder / "pin")
        commands = {
            "hwlicense device check --open": [*check, str(scene.package)],
            "pkcs11-tool --derive": peer,
            "python: nothing": scene.script("pass"),
        }
        times = in_turn({n: partial(run, c, token.environment) for n, c in commands.items()}, runs)
        return {name: summary._asdict() for name, summary in times.items()}


def pulling(scene: Scene, kind: str, pulls: int) -> dict[str, Any]:
    """Seconds from pulling to the first refused session, and from plugging to the next; and what sessions gave."""
    with ExitStack() as stack:
        piece: Token | Dongle
        if kind == "token":
            _, token, bound = stack.enter_context(_token(scene, "pulled-token", TERMS))
            piece, uri = token, token.uri
        else:
            piece, bound = stack.enter_context(_dongle(scene, "pulled-dongle", TERMS))
            uri = None
        model = stack.enter_context(bound.open(uri))
        network = onnxruntime.InferenceSession(model.path(NETWORK))
        given = np.random.default_rng(1).standard_normal((1, 3, 48, 192)).astype(np.float32)
        expected = _inferred(network, given)
        refused, back, different, reasons = [], [], 0, set()
        for turn in range(pulls):
            time.sleep(0.3 + turn % 7 / 10)  # pulls meet every moment between two proofs
            with model.session():
                piece.pull()
                pulled = time.monotonic()
                while True:
                    try:
                        with model.session():
                            pass
                    except hwlicense.HwlicenseError as error:
                        refused.append(time.monotonic() - pulled)
                        reasons.add(str(error.reason))
                        break
                    time.sleep(0.002)
                different += _inferred(network, given) != expected
            piece.plug()
            plugged = time.monotonic()
            while not model.standing().may_start:
                time.sleep(0.002)
            back.append(time.monotonic() - plugged)
    return {
        "interval": INTERVAL,
        "refused": Summary.of(refused)._asdict(),
        "back": Summary.of(back)._asdict(),
        "reasons": sorted(reasons),
        "sessions_in_progress": pulls,
        "different_results": different,
    }


def load(scene: Scene, seconds: float) -> dict[str, int]:
    """Threads, and forked processes, that open and use one token-bound license all the time."""
    with _token(scene, "load", PLAIN) as (reader, token, bound):
        reading, writing = os.pipe()
        children = []
        for _ in range(PROCESSES):
            if not (child := os.fork()):
                status = 1
                try:
                    os.close(reading)
                    os.write(writing, pickle.dumps(_use(bound, token.uri, seconds)))
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        os.close(writing)
        counts: list[tuple[int, int, list[str]]] = []
        threads = [
            threading.Thread(target=lambda: counts.append(_use(bound, token.uri, seconds))) for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ended = [os.waitpid(child, 0)[1] for child in children]
        with os.fdopen(reading, "rb") as results:
            counts += [pickle.load(results) for _ in children]  # noqa: S301  # written by the children above
        errors = [error for _, _, found in counts for error in found]
        return {
            "threads": THREADS,
            "processes": PROCESSES,
            "seconds": int(seconds),
            "opened": sum(opened for opened, _, _ in counts),
            "used": sum(used for _, used, _ in counts),
            "errors": len(errors) + sum(map(bool, ended)),
            "open_sessions_left": reader.open_sessions,
            "overlapping_calls": len(reader.overlaps),
        }


def _use(bound: Bound, uri: str, seconds: float) -> tuple[int, int, list[str]]:
    opened = used = 0
    errors: list[str] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with bound.open(uri) as model:
                opened += 1
                with model.session():
                    used += bool(len(model.read(NETWORK)))
        except hwlicense.HwlicenseError as error:
            errors.append(repr(error))
    return opened, used, errors


def faults(scene: Scene, kind: str) -> list[dict[str, Any]]:
    """One row for each call that an opening makes: what the application sees if the module fails there."""
    with ExitStack() as stack:
        # Each with a module, and so a process, of its own: a module that hangs is waited for
        benches = [stack.enter_context(_token(scene, f"{kind}-{number}", PLAIN)) for number in range(BENCHES)]
        reader, token, bound = benches[0]
        reader.forget()
        bound.open(token.uri).close()
        calls = list(enumerate(reader.calls, 1))
        shares = [calls[number::BENCHES] for number in range(BENCHES)]
        with ThreadPoolExecutor(BENCHES) as pool:
            rows = pool.map(lambda bench, share: [_fault(kind, *bench, *call) for call in share], benches, shares)
            return sorted((row for some in rows for row in some), key=lambda row: row["call"])


def _fault(kind: str, reader: Reader, token: Token, bound: Bound, place: int, function: str) -> dict[str, Any]:
    getattr(reader, kind)(None, place)
    began = time.monotonic()
    reason = "none: the call came after the answer"
    try:
        bound.open(token.uri).close()
    except hwlicense.HwlicenseError as error:
        reason = str(error.reason)
    seconds = time.monotonic() - began
    left, logged_in = reader.open_sessions, reader.logged_in
    reader.heal()
    bound.open(token.uri).close()  # raises if the application did not live on
    return {
        "call": place,
        "function": function,
        "reason": reason,
        "seconds": seconds,
        "sessions_left": left,
        "logged_in": logged_in,
    }


def _network() -> bytes:
    """A real network, of those that the label reader uses."""
    import rapidocr_onnxruntime  # noqa: PLC0415

    found = sorted(Path(rapidocr_onnxruntime.__file__).parent.glob("models/*cls*.onnx"))
    return found[0].read_bytes()


def _inferred(network: onnxruntime.InferenceSession, given: np.ndarray[Any, Any]) -> bytes:
    return b"".join(np.asarray(each).tobytes() for each in network.run(None, {network.get_inputs()[0].name: given}))


def table(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    lines = [f"{'opening, whole process':<34}{'median ms':>10}{'from':>8}{'to':>8}"]
    for name, one in found["opening"].items():
        row = "".join(f"{one[key] * 1e3:>{width}.0f}" for key, width in (("median", 10), ("least", 8), ("most", 8)))
        lines.append(f"{name:<34}{row}")
    lines += [
        "",
        f"{'pulls':<10}{'pulls':>6}{'interval s':>11}{'refused after: median':>22}{'worst':>8}{'different':>10}",
    ]
    for kind, one in found["pulls"].items():
        refused = one["refused"]
        lines.append(
            f"{kind:<10}{refused['runs']:>6}{one['interval']:>11}{refused['median']:>22.2f}{refused['most']:>8.2f}"
            f"{one['different_results']:>10}  {', '.join(one['reasons'])}; back after {one['back']['median']:.2f} s"
        )
    lines += ["", "load: " + ", ".join(f"{name} {count}" for name, count in found["load"].items())]
    for kind, rows in found["faults"].items():
        lines += ["", f"{kind} at each call of an opening"]
        lines += [
            f"{row['call']:>4} {row['function']:<22}{row['reason']:<38}{row['seconds']:>7.2f} s, sessions left "
            f"{row['sessions_left']}, logged in {row['logged_in']}, opened again"
            for row in rows
        ]
    return lines
