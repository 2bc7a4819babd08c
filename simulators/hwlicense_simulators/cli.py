"""`hwlicense simulate`: run a command with simulated hardware around it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hwlicense_simulators.control import Control, orders
from hwlicense_simulators.dongle import Dongle
from hwlicense_simulators.errors import SimulatorError
from hwlicense_simulators.measured_boot import DEFAULT_BOOT, Measurements
from hwlicense_simulators.token import Token
from hwlicense_simulators.tpm import Tpm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_TOUCH_AFTER = 1.0  # seconds
_FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


@click.command(context_settings={"allow_interspersed_args": False, "max_content_width": 100})
@click.option("--tpm", is_flag=True, help="Simulate a TPM 2.0 with an EK certificate and a measured boot.")
@click.option("--token", is_flag=True, help="Simulate a PKCS#11 token. Its PIN is 123456.")
@click.option("--dongle", is_flag=True, help="Simulate a USB dongle for HMAC-SHA1, for Python programs with pyusb.")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the hardware in this folder, and use what is there: the same device, booted again. "
    "Token and dongle are in its folders token and dongle.",
)
@click.option("--firmware", metavar="TEXT", help='What PCR 0 measures, instead of "firmware 1": a firmware update.')
@click.option(
    "--boot",
    metavar="INDEX=TEXT|FILE",
    multiple=True,
    help="What a PCR measures at boot, or a TOML file with all of it. May be repeated.",
)
@click.option(
    "--pulled",
    type=click.Choice(["token", "dongle"]),
    multiple=True,
    help="Start with it not plugged in. May be repeated.",
)
@click.option("--dongle-blank", is_flag=True, help="A new dongle has no secret: its slots are not programmed.")
@click.option("--dongle-touch", is_flag=True, help="The dongle waits for a touch, which comes after a second.")
@click.option("--no-touch", is_flag=True, help="With --dongle-touch: it does not come by itself.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def simulate(  # noqa: PLR0913  one argument per option
    context: click.Context,
    *,
    tpm: bool,
    token: bool,
    dongle: bool,
    state: Path | None,
    firmware: str | None,
    boot: tuple[str, ...],
    pulled: tuple[str, ...],
    dongle_blank: bool,
    dongle_touch: bool,
    no_touch: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND with simulated hardware, and pass on its exit status.

    COMMAND finds the hardware by its environment. HWLICENSE_TPM and TPM2TOOLS_TCTI name the TPM, and
    HWLICENSE_SIMULATOR_EK_ROOT a PEM file with the root of its EK certificate, for vendor issue --ek-root.
    HWLICENSE_TOKEN is the token's URI. HWLICENSE_USB says which dongle; it is on a bus of its own, which Python
    programs find by HWLICENSE_SIMULATOR_USB and PYTHONPATH. Everything ends with COMMAND.

    HWLICENSE_SIMULATOR_CONTROL is a folder for orders while COMMAND runs: make a file there that is named
    pull-token, plug-token, pull-dongle, plug-dongle or touch, and it is gone when that is done.

    \b
    Examples:
      hwlicense simulate --tpm -- pytest tests
      hwlicense simulate --tpm --state board-7 -- ./selftest.sh
      hwlicense simulate --tpm --state board-7 --firmware "firmware 2" -- ./selftest.sh
      hwlicense simulate --token --state token-3 -- ./selftest.sh
      hwlicense simulate --dongle --dongle-touch --pulled dongle -- ./selftest.sh
    """  # noqa: D301  click needs the \b itself
    _check(
        {
            "Nothing to simulate: give --tpm, --token or --dongle.": tpm or token or dongle,
            "--firmware and --boot are about a TPM: give --tpm.": tpm or not (firmware or boot),
            "--dongle-blank and --dongle-touch are about a dongle: give --dongle.": dongle
            or not (dongle_blank or dongle_touch),
            "--no-touch is about --dongle-touch.": dongle_touch or not no_touch,
            "--pulled names what is not simulated.": (token or "token" not in pulled)
            and (dongle or "dongle" not in pulled),
        }
    )
    try:
        with _signals_blocked() as mask, contextlib.ExitStack() as stack:
            environment = dict(os.environ)
            if tpm:
                environment |= _tpm(stack, state, boot, firmware)
            the_token = _token(stack, state, plugged="token" not in pulled) if token else None
            the_dongle = (
                _dongle(stack, state, plugged="dongle" not in pulled, programmed=not dongle_blank) if dongle else None
            )
            if the_dongle and dongle_touch:
                the_dongle.await_touch()
                if not no_touch:
                    the_dongle.touch_after(_TOUCH_AFTER)
            for hardware in (the_token, the_dongle):
                environment |= hardware.environment if hardware else {}
            if the_token or the_dongle:
                control = stack.enter_context(Control(orders(the_token, the_dongle)))
                environment |= control.environment
            status = _run(command, environment, mask)
    except SimulatorError as error:
        # An exit, not a ClickException: `hwlicense` takes those for wrong usage.
        click.echo(f"error: {error}\nreason: {error.reason}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        status = 3
    context.exit(status)


def _check(rules: Mapping[str, bool]) -> None:
    for usage, is_kept in rules.items():
        if not is_kept:
            raise click.UsageError(usage)


def _tpm(stack: contextlib.ExitStack, state: Path | None, boot: Sequence[str], firmware: str | None) -> dict[str, str]:
    measured = firmware.encode() if firmware else None
    tpm = stack.enter_context(Tpm(state, boot=_boot(boot), firmware=measured))
    # The wire lets several processes use the TPM, as the kernel's /dev/tpmrm0 does; swtpm alone serves one.
    wire = stack.enter_context(tpm.tapped(record=False))
    click.echo(f"simulated TPM: {wire.tcti}\nits EK root: {tpm.ek_root}", err=True)
    return wire.environment


def _token(stack: contextlib.ExitStack, state: Path | None, *, plugged: bool) -> Token:
    token = stack.enter_context(Token(folder=state / "token" if state else None))
    if token.plugged != plugged:  # a kept one is where it was
        (token.plug if plugged else token.pull)()
    click.echo(f"simulated token: {token.uri}\nits PIN: {token.pin}", err=True)
    return token


def _dongle(stack: contextlib.ExitStack, state: Path | None, *, plugged: bool, programmed: bool) -> Dongle:
    folder = state / "dongle" if state else None
    dongle = stack.enter_context(
        Dongle(folder, plugged=plugged, programmed=programmed, serial=1_000_000 + secrets.randbelow(9_000_000))
    )
    click.echo(f"simulated dongle: {dongle.selector}", err=True)
    return dongle


def _boot(options: Sequence[str]) -> Measurements:
    boot = dict(DEFAULT_BOOT)
    for option in options:
        if match := re.fullmatch(r"([0-9]{1,2})=(.*)", option, re.DOTALL):
            boot[int(match[1])] = match[2].encode()
        else:
            boot = dict(_boot_file(Path(option)))
    return boot


def _boot_file(path: Path) -> Measurements:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"--boot {path}: neither INDEX=TEXT nor a file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--boot {path}: {error}") from error
    return {_index(path, key): _measured(path, key, value) for key, value in table.items()}


def _index(path: Path, key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,2}", key):
        raise click.UsageError(f"--boot {path}: {key!r} is not the number of a PCR")
    return int(key)


def _measured(path: Path, key: str, value: object) -> list[bytes]:
    texts = value if isinstance(value, list) else [value]
    measured = [text.encode() for text in texts if isinstance(text, str)]
    if len(measured) != len(texts):
        raise click.UsageError(f"--boot {path}: {key} needs a text or a list of texts")
    return measured


@contextlib.contextmanager
def _signals_blocked() -> Iterator[set[signal.Signals]]:
    """Block what `_run` waits for; the threads of the simulators inherit that, so that no signal passes it by."""
    waited = {*_FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    try:
        yield {signal.Signals(number) for number in before}
    finally:
        # A second Ctrl-C while the simulators ended is not for what comes after.
        while signal.sigtimedwait(waited - before, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(command: Sequence[str], environment: Mapping[str, str], mask: set[signal.Signals]) -> int:
    if early := signal.sigtimedwait(_FORWARDED, 0):
        return 128 + early.si_signo
    try:
        child = os.posix_spawnp(command[0], list(command), environment, setsigmask=mask, setsigdef=[signal.SIGPIPE])
    except FileNotFoundError:
        click.echo(f"error: {command[0]}: command not found", err=True)
        return 127
    except OSError as error:
        click.echo(f"error: {command[0]}: {error.strerror}", err=True)
        return 126
    while True:
        received = signal.sigwaitinfo({*_FORWARDED, signal.SIGCHLD})
        if received.si_signo != signal.SIGCHLD:
            # A terminal sends its signals to the command, too (si_code above 0: from the kernel).
            if received.si_code <= 0:
                os.kill(child, received.si_signo)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
