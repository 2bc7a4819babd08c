"""A simulated machine's TPM 2.0: swtpm, made like a real one and booted like a real one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hwlicense_simulators import commands, measured_boot
from hwlicense_simulators.authority import CertificateAuthority
from hwlicense_simulators.errors import SimulatorError, program
from hwlicense_simulators.manufacture import StorageKey, manufacture
from hwlicense_simulators.measured_boot import DEFAULT_BOOT, Measurements
from hwlicense_simulators.process import Process, ShortFolder
from hwlicense_simulators.wire import Wire, environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

_START, _ANSWER = 10.0, 10.0  # seconds for swtpm to answer after its start, and afterwards


class Tpm:
    """One TPM in one machine, as a context manager: switched on at its start, gone at its end.

    Without `folder` it is new and is thrown away; with one it is kept there and used again. A kept TPM stays what it
    was made as: `authority`, `banks`, `storage_key` and `ek_certificates` matter when it is made. `boot` is what the
    machine measures at every boot, data to be hashed by PCR index; `firmware` replaces what PCR 0 measures.
    `storage_key` provides a persistent SRK at 0x81000001, as an installed operating system may have done. Without
    `ek_certificates` it has endorsement keys only, as many firmware TPMs.

    Methods raise SimulatorError. swtpm serves one client at a time: a method that sends a command waits for another
    client to leave, at most ten seconds; `tapped` serves several.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        authority: CertificateAuthority | None = None,
        boot: Measurements = DEFAULT_BOOT,
        firmware: bytes | None = None,
        banks: Sequence[str] = ("sha256",),
        storage_key: StorageKey | None = None,
        ek_certificates: bool = True,
    ) -> None:
        self.boot = _with_firmware(boot, firmware)
        self._kept = Path(folder).absolute() if folder is not None else None
        self._authority = authority
        self._banks, self._storage_key, self._ek_certificates = tuple(banks), storage_key, ek_certificates
        self._short: ShortFolder | None = None
        self._process: Process | None = None
        self._lock: int | None = None
        self._wires = 0
        self._power = threading.RLock()  # so that one thread may cut the power while another works

    def __enter__(self) -> Self:
        try:
            self._short = ShortFolder()
            self._open_folder()
            self.start()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._kept and self.running:
                self.stop()
        except SimulatorError as late:
            if error is None:
                raise
            error.add_note(str(late))
        finally:
            self._release()

    # where it is

    @property
    def tcti(self) -> str:
        """The TCTI string of tpm2-tss; the control channel is at the same path with .ctrl."""
        return f"swtpm:path={self._socket}"

    @property
    def ek_root(self) -> Path:
        """PEM file with the root of the EK certificates."""
        return self._home / "ek-root.pem"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a child process: HWLICENSE_TPM, TPM2TOOLS_TCTI and HWLICENSE_SIMULATOR_EK_ROOT."""
        return environment(self.tcti, self.ek_root)

    @property
    def state(self) -> Path:
        """The folder of swtpm's own state: what an attacker copies and restores while the machine is off."""
        return self._home / "tpm"

    @property
    def running(self) -> bool:
        """Whether the machine is switched on."""
        return self._process is not None and self._process.running

    @property
    def pid(self) -> int:
        """The process id of swtpm."""
        if self._process is None:
            raise SimulatorError("the simulated machine is off")
        return self._process.pid

    # the machine's switch

    def start(self, *, resume: bool = False) -> None:
        """Switch on: TPM2_Startup, then the measured boot, unless this is a `resume`."""
        with self._power:
            if self.running:
                raise SimulatorError("the simulated machine is on already")
            self._start_swtpm("startup-state" if resume else "startup-clear")
            if not resume:
                for index, data in measured_boot.events(self.boot):
                    self.extend(index, data)

    def stop(self) -> None:
        """Shut down in order (TPM2_Shutdown) and switch off."""
        with self._power:
            self._shut_down(keep_state=False)

    def reboot(self, *, boot: Measurements | None = None, firmware: bytes | None = None) -> None:
        """Shut down in order and boot, measuring something else from now on if told."""
        with self._power:
            self.stop()
            self.boot = _with_firmware(self.boot if boot is None else boot, firmware)
            self.start()

    def power_cut(self, *, restart: bool = True) -> None:
        """Stop without a TPM2_Shutdown, even in the middle of a command; then boot, unless told to stay off."""
        with self._power:
            if self._process is not None:
                self._process.kill()
            if restart:
                self.start()

    def suspend(self) -> None:
        """Suspend to RAM: the TPM saves its state, PCRs included, and loses power."""
        with self._power:
            self._shut_down(keep_state=True)

    def resume(self) -> None:
        """Come back from `suspend`."""
        self.start(resume=True)

    # what software on the machine might do

    def extend(self, index: int, data: bytes) -> None:
        """Measure `data` into a PCR, in every bank."""
        self.command(commands.pcr_extend(index, data), f"extending PCR {index}")

    def pcr(self, index: int, bank: str = "sha256") -> bytes:
        """The value of a PCR now."""
        value = commands.pcr_value(self.command(commands.pcr_read(index, bank), f"reading PCR {index}"))
        if value is None:
            raise SimulatorError(f"this TPM has no {bank} bank", "name it in banks= when the TPM is made")
        return value

    def clear(self) -> None:
        """TPM2_Clear by the lockout hierarchy: new storage seed, no owner objects, clock and counters at zero."""
        self.command(commands.clear(), "clearing the TPM")

    def command(self, command: bytes, what: str = "the command") -> bytes:
        """Send one command as bytes and return the answer; any response code but success raises."""
        return commands.checked(self._exchange(command, _ANSWER), what)

    @contextlib.contextmanager
    def tapped(self, *, record: bool = True) -> Iterator[Wire]:
        """A wire to this TPM that records, alters, delays and cuts; it outlives reboots and serves several clients."""
        self._wires += 1
        with Wire(self._folder / f"wire-{self._wires}", self._socket, self.ek_root, record=record) as wire:
            yield wire

    # inside

    @property
    def _folder(self) -> Path:
        if self._short is None:
            raise SimulatorError("the simulated TPM is not in use", "use it as a context manager: with Tpm() as tpm:")
        return self._short.path

    @property
    def _socket(self) -> Path:
        return self._folder / "tpm"

    @property
    def _home(self) -> Path:
        return self._kept or self._folder / "home"

    def _open_folder(self) -> None:
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self._home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise SimulatorError(
                f"another process uses the TPM in {self._home}", "wait for it, or use another folder"
            ) from None
        (self._folder / "state").symlink_to(self._home)
        if self.state.exists():
            return
        authority = self._authority or CertificateAuthority(self._home / "authority")
        fresh = self._home / "tpm.new"
        shutil.rmtree(fresh, ignore_errors=True)  # left by a process that was killed
        manufacture(
            self._folder / "state" / fresh.name,
            self._folder,
            authority,
            banks=self._banks,
            storage_key=self._storage_key,
            ek_certificates=self._ek_certificates,
        )
        shutil.copyfile(authority.root, self.ek_root)
        fresh.rename(self.state)

    def _start_swtpm(self, startup: str) -> None:
        for path in (self._socket, Path(f"{self._socket}.ctrl")):
            path.unlink(missing_ok=True)
        self._process = Process(
            [
                *(program("swtpm"), "socket", "--tpm2"),
                *("--tpmstate", f"dir={self._folder / 'state' / 'tpm'}"),
                *("--server", f"type=unixio,path={self._socket},mode=0600"),
                *("--ctrl", f"type=unixio,path={self._socket}.ctrl,mode=0600"),
                *("--flags", f"not-need-init,{startup}"),
            ],
            self._folder / "swtpm.log",
        )
        self._process.start()
        deadline = time.monotonic() + _START
        while True:
            try:
                answer = commands.exchange(self._socket, commands.read_clock(), _ANSWER)
            except (FileNotFoundError, ConnectionError, EOFError) as error:
                if time.monotonic() > deadline or not self._process.running:
                    self._process.kill()
                    raise SimulatorError(
                        f"swtpm did not start: {self._process.output or error}",
                        f"look at the state in {self.state}; AppArmor may keep swtpm out of such a folder",
                    ) from error
            else:
                commands.checked(answer, "starting the TPM")
                return
            time.sleep(0.001)

    def _shut_down(self, *, keep_state: bool) -> None:
        if self._process is None or not self.running:
            raise SimulatorError("the simulated machine is off already")
        try:
            self.command(commands.shutdown(keep_state=keep_state), "shutting down the TPM")
        finally:
            # swtpm has written everything when it answers TPM2_Shutdown.
            self._process.kill()

    def _exchange(self, command: bytes, seconds: float) -> bytes:
        try:
            return commands.exchange(self._socket, command, seconds)
        except TimeoutError as error:
            raise SimulatorError(
                "another client keeps the simulated TPM to itself", "close that client, or give it tapped() to use"
            ) from error
        except (OSError, EOFError) as error:
            raise SimulatorError(f"the simulated TPM does not answer: {error}") from error

    def _release(self) -> None:
        if self._process is not None:
            self._process.kill()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._short is not None:
            self._short.close()


def _with_firmware(boot: Measurements, firmware: bytes | None) -> Measurements:
    return {**boot} if firmware is None else {**boot, 0: firmware}
