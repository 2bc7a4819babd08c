"""The documentation as tests: finds the fenced blocks of a document and plays them as one story.

All blocks of a document run in order in one fresh folder. bash, sh and console blocks keep variables and the current
folder from block to block; python blocks share one namespace, in one process; toml and json must parse, and toml with
a `product` must be valid terms. `text` and `mermaid` are for reading. Any other language, or none, is an error.

Directives are HTML comments, so that readers do not see them. Those about a block stand before it:
    <!-- test: tpm -->                the whole document has a simulated TPM
    <!-- test: file NAME -->          made-up bytes under that name, there from the start
    <!-- test: file NAME = PATH -->   a copy of a file or folder of this repository
    <!-- test: exits 1 -->            the block is to end with this status
    <!-- test: output -->             the block is what the block before it printed; `...` stands for anything
    <!-- test: saved as NAME -->      the block is a file that the reader writes
    <!-- test: not run: REASON -->    the block is left out, and listed with its reason when the tests end
    <!-- test: hidden                 bash that the reader does not see
    COMMANDS -->
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from hwlicense.core.errors import HwlicenseError
from hwlicense.core.terms import parse_terms
from hwlicense_simulators import Tpm

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).resolve().parents[2]
SECONDS = 300.0
"""For one block. `make` inside a document is marked as not run."""
_FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>\S*)")
_ABOUT_DOCUMENT = ("tpm", "file ")
_ABOUT_BLOCK = ("exits ", "output", "saved as ", "not run:")
# Python blocks in one process: each line on standard input is a block, each line on the last descriptor its status.
_PYTHON = """
import json, os, sys, traceback
names, log, status = {"__name__": "__main__"}, sys.argv[2], os.fdopen(int(sys.argv[1]), "w", buffering=1)
sys.argv = [""]
for line in sys.stdin:
    place, code = json.loads(line)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    try:
        exec(compile(code, place, "exec"), names)
        print(0, file=status)
    except SystemExit as end:
        print(end.code or 0, file=status)
    except BaseException:
        traceback.print_exc()
        print(1, file=status)
"""


class DocumentError(AssertionError):
    """A block does not do what the document says; the text names the document and the line."""


@dataclass
class Block:
    """One fenced block, with what its directives ask for."""

    place: str
    language: str
    text: str
    directives: list[str] = field(default_factory=list)

    def asked(self, start: str) -> str | None:
        """What follows `start` in the directive that begins with it; None where there is none."""
        return next((d.removeprefix(start).strip() for d in self.directives if d.startswith(start)), None)


def read(path: Path) -> tuple[list[str], list[Block]]:
    """The directives about the document, and its blocks. Raises DocumentError for what could escape the tests."""
    about: list[str] = []
    waiting: list[str] = []
    blocks: list[Block] = []
    lines = iter(enumerate(path.read_text().splitlines(), 1))
    for number, line in lines:
        place = f"{path.name}:{number}"
        if fence := _FENCE.match(line):
            body = list(_until(fence["fence"], lines, place, len(fence["indent"])))
            blocks.append(Block(place, fence["language"], "\n".join([*body, ""]), waiting))
            waiting = []
        elif line.startswith("<!-- test:"):
            directive = line if "-->" in line else "\n".join([line, *_until("-->", lines, place, 0, keep=True)])
            directive = directive.removeprefix("<!-- test:").partition("-->")[0].strip()
            if directive.startswith("hidden\n"):
                blocks.append(Block(place, "bash", directive.removeprefix("hidden\n") + "\n"))
            elif directive.startswith(_ABOUT_DOCUMENT):
                about.append(directive)
            elif directive.startswith(_ABOUT_BLOCK) and directive != "not run:":
                waiting.append(directive)
            else:
                raise DocumentError(
                    f"{place}: no such directive: {directive!r} (a block is left out only with a reason)"
                )
        elif "<!-- test:" in line or "```" in line:
            raise DocumentError(f"{place}: a fence or directive stands at the start of its line, or it is not seen")
    if waiting:
        raise DocumentError(f"{path.name}: no block follows {waiting}")
    return about, blocks


def _until(end: str, lines: Iterator[tuple[int, str]], place: str, indent: int, *, keep: bool = False) -> Iterator[str]:
    for _, line in lines:
        if (end in line) if keep else line.strip() == end:
            if keep:
                yield line
            return
        yield line.removeprefix(" " * indent)
    raise DocumentError(f"{place}: nothing ends what begins here")


class Story:
    """Plays the blocks of one document. A context manager: what it started is gone at its end."""

    def __init__(self, folder: Path, about: list[str]) -> None:
        self.folder = folder / "here"
        self.not_run: list[str] = []
        self._state = folder / "state"
        self._log = folder / "log"
        self._printed = ""
        self._about = about
        self._python: tuple[subprocess.Popen[str], IO[str]] | None = None
        self._groups: list[int] = []
        self._stack = contextlib.ExitStack()
        self._environment = {
            "HOME": str(folder / "home"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def __enter__(self) -> Self:
        """Lay out the folder and start the TPM."""
        for folder in (self.folder, Path(self._environment["HOME"])):
            folder.mkdir(parents=True)
        self._state.touch()
        for directive in self._about:
            name, _, source = (part.strip() for part in directive.removeprefix("file").partition("="))
            if directive == "tpm":
                self._environment |= self._stack.enter_context(Tpm()).environment
            elif not source:
                (self.folder / name).write_bytes(b"made up for a test\n" * 4096)
            elif (TOP / source).is_dir():
                shutil.copytree(TOP / source, self.folder / name)
            else:
                shutil.copy(TOP / source, self.folder / name)
        return self

    def __exit__(self, *exception: object) -> None:
        """End every process that a block left running."""
        if self._python:
            self._python[0].kill()
            self._python[0].communicate()
            self._python[1].close()
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._stack.close()

    def play(self, block: Block) -> None:
        """Run or check one block. Raises DocumentError."""
        if (reason := block.asked("not run:")) is not None:
            self.not_run.append(f"{block.place}: {reason}")
        elif (name := block.asked("saved as ")) is not None:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(block.text)
            self._parse(block)
        elif block.asked("output") is not None:
            _compare(block, block.text, self._printed)
        elif block.language in ("bash", "sh", "python"):
            self._run(block, block.text)
        elif block.language == "console":
            self._console(block)
        elif block.language in ("toml", "json", "text", "mermaid"):
            self._parse(block)
        else:
            raise DocumentError(
                f"{block.place}: a block in {block.language or 'no language'} is never tested: name one that is"
            )

    def _parse(self, block: Block) -> None:
        try:
            if block.language == "json":
                json.loads(block.text)
            elif block.language == "toml" and "product" in tomllib.loads(block.text):
                parse_terms(block.text)
        except (ValueError, HwlicenseError) as error:
            raise DocumentError(f"{block.place}: {error}") from error

    def _console(self, block: Block) -> None:
        for part in re.split(r"^(?=\$ )", block.text, flags=re.MULTILINE):
            command, _, expected = part.removeprefix("$ ").partition("\n")
            if part:
                self._run(block, command + "\n")
                _compare(block, expected, self._printed)

    def _run(self, block: Block, text: str) -> None:
        with self._log.open("w") as log:
            status = self._in_python(block.place, text) if block.language == "python" else self._in_bash(text, log)
        self._printed = self._log.read_text()
        expected = int(block.asked("exits ") or 0)
        if status != expected:
            raise DocumentError(f"{block.place}: ended with {status}, not {expected}:\n{text}printed:\n{self._printed}")

    def _in_bash(self, text: str, log: IO[str]) -> int:
        keep = f'{{ export -p; printf "cd %q\\n" "$PWD"; }} >{shlex.quote(str(self._state))}'
        script = f"source {shlex.quote(str(self._state))}\nset -aeuo pipefail\ntrap {shlex.quote(keep)} EXIT\n{text}"
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=self.folder, env=self._environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._groups.append(process.pid)
        return process.wait(SECONDS)

    def _in_python(self, place: str, text: str) -> int:
        if not self._python:
            reading, writing = os.pipe()
            start = (
                f'source {shlex.quote(str(self._state))}; exec python -c "$0" {writing} {shlex.quote(str(self._log))}'
            )
            process = subprocess.Popen(
                ["bash", "-c", start, _PYTHON],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.PIPE,
                text=True,
                pass_fds=(writing,),
                start_new_session=True,
            )
            os.close(writing)
            self._python = process, os.fdopen(reading)
            self._groups.append(process.pid)
        process, statuses = self._python
        assert process.stdin is not None
        process.stdin.write(json.dumps([place, text]) + "\n")
        process.stdin.flush()
        if not select.select([statuses], [], [], SECONDS)[0]:
            raise DocumentError(f"{place}: not done after {SECONDS:.0f} s")
        return int(statuses.readline() or 1)


def _compare(block: Block, expected: str, printed: str) -> None:
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
    if not re.fullmatch(pattern, printed.strip(), re.DOTALL):
        raise DocumentError(f"{block.place}: expected:\n{expected}\nprinted:\n{printed}")


def play(path: Path, folder: Path) -> list[str]:
    """Play a document in a fresh `folder`; return what it leaves out, with the reasons. Raises DocumentError."""
    about, blocks = read(path)
    with Story(folder, about) as story:
        for block in blocks:
            story.play(block)
    return story.not_run
