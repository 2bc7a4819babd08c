"""`hwlicense exec`: programs that are not Python, as the command line runs them."""

import os
import pty
import resource
import select
import signal
import socket
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

import hwlicense
from hwlicense.vendor.compiling import compile_code
from tests.programs import READY, children, runs, shop, until
from tests.sealed import Sealed
from tests.world import MEMBERS, PROGRAM, run

FD = ["--fd"]


@pytest.fixture(scope="module")
def here(vendor, tmp_path_factory):
    with shop(vendor, tmp_path_factory.mktemp("shop")) as found:
        yield found


@pytest.fixture(params=["--at", "--fd"])
def how(request, here):
    return ["--at", here.at] if request.param == "--at" else FD


# ---- the files


def test_at_a_folder(here):
    (here.folder / "input").write_text("from the terminal\n")
    script = "cat at/labels/names.txt; find at -type f -printf '%m %s %P\\n' | sort; cat"
    with (here.folder / "input").open() as standard_input:
        done = here.exec("sh", "-c", script, stdin=standard_input)
    files = sorted(f"400 {len(content)} {name}" for name, content in MEMBERS.items())
    assert done.stdout.splitlines() == ["bolt", "nut", *files, "from the terminal"]
    assert done.stderr == ""
    digest = here.exec("sha256sum", here.at / "weights.bin").stdout
    assert digest == run_with(["sha256sum"], MEMBERS["weights.bin"]).replace("-", str(here.at / "weights.bin"))


def test_a_packages_code_is_not_for_programs(own_vendor, tmp_path):
    sealed = Sealed(own_vendor, tmp_path)
    own_vendor.package, own_vendor.manifest = sealed.package, sealed.manifest
    with shop(own_vendor, tmp_path) as found:
        assert found.exec("cat", "{weights.bin}", given=FD).stdout == "weights"
        script = "find at -type f; echo $HWLICENSE_FDS"
        done = found.exec("sh", "-c", script)
        assert (done.stdout.split(), done.stderr) == (["at/weights.bin"], "")


def test_a_package_of_code_alone_has_nothing_for_programs_and_says_so(own_vendor, tmp_path, how):
    sealed = Sealed(own_vendor, tmp_path)
    compiled_code = compile_code([sealed.folder / "source" / "reader"], "reader")
    own_vendor.package = tmp_path / "code.hwpkg"
    own_vendor.manifest = own_vendor.pack(own_vendor.package, compiled=compiled_code)
    with shop(own_vendor, tmp_path) as found:
        done = found.exec("echo", "ran", given=how)
    assert done.stdout == "ran\n"
    assert "no files but code" in done.stderr
    assert "hwlicense run" in done.stderr


def run_with(words, data):
    return subprocess.run(words, input=data, capture_output=True, check=True).stdout.decode()


def test_by_descriptors(here):
    script = 'cat "$1"; echo "$2"; cat "/proc/self/fd/$(printf %s "$HWLICENSE_FDS" | tr -dc "0-9" | head -c 1)"'
    done = here.exec("sh", "-c", script, "x", "{labels/names.txt}", '{"a": {}}{weights}', given=FD)
    assert done.stdout == 'bolt\nnut\n{"a": {}}{weights}\n'
    code = (
        "import json, os; print({n: os.fstat(f).st_size for n, f in json.loads(os.environ['HWLICENSE_FDS']).items()})"
    )
    done = here.exec(sys.executable, "-c", code, given=FD)
    assert done.stdout.strip() == str({name: len(content) for name, content in sorted(MEMBERS.items())})
    mapped = "import mmap, sys; f = open(sys.argv[1], 'rb'); print(mmap.mmap(f.fileno(), 0, prot=1)[:8])"
    assert here.exec(sys.executable, "-c", mapped, "{weights.bin}", given=FD).stdout == "b'a marker'\n"


def test_a_package_with_a_program_in_it(vendor, tmp_path):
    """It is started from the folder, or loaded as a library; only where that is asked for."""
    (tmp_path / "files" / "bin").mkdir(parents=True)
    program = tmp_path / "files" / "bin" / "tool"
    program.write_text('#!/bin/sh\necho "from $0"\n')
    package = tmp_path / "model.hwpkg"
    manifest = vendor.pack(package, tmp_path / "files", name="tools")
    with shop_of(vendor, tmp_path, manifest) as found:
        refused = found.exec(found.at / "bin" / "tool", status=126, package=package)
        assert "reason: COMMAND_UNUSABLE" in refused.stderr
        assert "hint: Make it executable; a program in DIR also takes --executable." in refused.stderr
        given = ["--at", found.at, "--executable"]
        done = found.exec("at/bin/tool", given=given, package=package)
        assert done.stdout == "from at/bin/tool\n"
        done = found.exec(found.at / "bin" / "none", given=given, package=package, status=127)


def shop_of(vendor, folder, manifest):
    own, own.manifest = type("Other", (), vars(vendor))(), manifest
    own.issue = type(vendor).issue.__get__(own)
    return shop(own, folder)


def test_started_in_the_folder_itself(here):
    done = here.exec("sh", "-c", "ls; cat labels/names.txt", given=["--at", "."], cwd=here.at)
    assert done.stdout.split() == ["empty", "labels", "weights.bin", "bolt", "nut"]


# ---- how it ends


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_the_exit_status(here, how, status):
    here.exec("sh", "-c", f"exit {status}", given=how, status=status)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGPIPE, signal.SIGINT])
def test_the_status_of_a_signal(here, how, number):
    here.exec("sh", "-c", f"kill -{number.value} $$", given=how, status=128 + number)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("way", ["--at", "--fd"])
def test_signals_are_passed_on_once(here, number, way):
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo {name}' {name}; echo set; for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; done; exit 9"
    with here.running(script, way) as process:
        assert process.stdout.readline() == "set\n"
        process.send_signal(number)
        assert process.wait(10) == 9
        assert process.stdout.read() == f"{name}\n"


def test_a_signal_that_was_ignored_stays_so(here):
    words = ["nohup", PROGRAM, "exec", here.vendor.package, "--fd", "--", "sh", "-c", READY + "sleep 1; echo alive"]
    with subprocess.Popen(
        words, env=here.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.read() == "alive\n"
    assert process.returncode == 0


def at_terminal(here, how, *command):
    """A program that has said that it is ready: hwlicense's number, the terminal, what is heard, and a wait for it."""
    words = [PROGRAM, "exec", here.vendor.package, *map(str, how), "--", *command]
    pid, terminal = pty.fork()
    if not pid:
        os.execve(words[0], words, here.environment)  # noqa: S606
    modes = termios.tcgetattr(terminal)
    modes[3] |= termios.NOFLSH  # or a signal takes away what was said and not heard yet
    termios.tcsetattr(terminal, termios.TCSANOW, modes)
    said = bytearray()

    def hears(text):
        while text not in said:
            assert select.select([terminal], [], [], 10)[0], said
            said.extend(os.read(terminal, 1024))

    hears(b"ready")
    return pid, terminal, said, hears


def test_at_a_terminal(here, how):
    """Ctrl-C reaches the program once, and it reads what is typed."""
    script = "trap 'echo got it' INT; echo ready; read line; read line; echo \"$line, status $?\"; exit 4"
    pid, terminal, said, hears = at_terminal(here, how, "bash", "-c", script)
    os.write(terminal, b"\x03")
    hears(b"got it")
    os.write(terminal, b"one\ntwo\n")
    hears(b"two, status 0")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    os.close(terminal)
    assert said.count(b"got it") == 1


def test_two_signals_of_a_terminal_at_once(here, how):
    """The keeper hears of either while both wait for it."""
    code = """
        import signal, sys
        for number in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, lambda number, _: print(signal.Signals(number).name, flush=True))
        print("ready", flush=True)
        print(sys.stdin.readline(), flush=True)
    """
    pid, terminal, said, hears = at_terminal(here, how, sys.executable, "-c", textwrap.dedent(code))
    keeper = children(pid)[0]
    os.kill(keeper, signal.SIGSTOP)
    os.write(terminal, b"\x03\x1c")
    hears(b"SIGINT")
    hears(b"SIGQUIT")
    time.sleep(0.5)  # hwlicense has heard of both and told the keeper
    os.kill(keeper, signal.SIGCONT)
    time.sleep(0.5)
    os.write(terminal, b"the end\n")
    hears(b"the end\r\nthe end")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
    assert (said.count(b"SIGINT"), said.count(b"SIGQUIT")) == (1, 1)


def test_an_opening_that_is_interrupted_starts_nothing(here):
    """SIGTERM while the TPM does not answer; the keeper is there by then."""
    address = f"swtpm:path={here.folder}/silent"
    words = [PROGRAM, "exec", here.vendor.package, "--fd", "--tpm", address, "--", "touch", "started"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here.folder / "silent"))
        listener.listen()
        with subprocess.Popen(words, env=here.environment, cwd=here.folder, stderr=subprocess.DEVNULL) as process:
            silent, _ = listener.accept()
            keeper = children(process.pid)[0]
            process.terminate()
            assert process.wait(10) == 143
        silent.close()
    until(lambda: not runs(keeper))
    assert not (here.folder / "started").exists()


# ---- what is wrong


def refused(done, reason, hint=""):
    assert f"reason: {reason}" in done.stderr, done.stderr
    assert f"hint: {hint}" in done.stderr, done.stderr
    assert done.stdout == ""


def test_a_command_that_is_not_there(here, how):
    for command in ("no-such-program", "./no-such-program", here.folder / "nowhere" / "program"):
        refused(here.exec(command, given=how, status=127), "COMMAND_ABSENT")
    script = here.folder / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    refused(here.exec(script, given=how, status=127), "COMMAND_ABSENT")


def test_a_command_that_cannot_be_run(here, how):
    text = here.folder / "text"
    text.write_text("echo no program\n")
    for command in (text, here.folder):
        refused(here.exec(command, given=how, status=126), "COMMAND_UNUSABLE", "Make it executable")
    text.chmod(0o755)  # no first line that says what runs it
    refused(here.exec(text, given=how, status=126), "COMMAND_UNUSABLE", "Make it executable")


def test_a_folder_that_will_not_do(here, tmp_path):
    link, file, full = tmp_path / "link", tmp_path / "file", tmp_path / "full"
    link.symlink_to(here.at)
    file.touch()
    (full / "something").mkdir(parents=True)
    for path, reason in ((link, "USAGE"), (file, "USAGE"), (full, "USAGE"), (tmp_path / "none", "FILE_ABSENT")):
        refused(here.exec("true", given=["--at", path], status=2), reason)
    refused(here.exec("true", given=["--at", file / "below"], status=2), "USAGE")
    refused(here.exec("true", given=["--at", f"{link}/"], status=2), "USAGE")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "How is COMMAND to get the files?"),
        (["--fd", "--at", "at"], "exclude each other"),
        (["--fd", "--executable"], "about the folder of --at"),
        (["--executable"], "How is COMMAND to get the files?"),
    ],
)
def test_options_that_do_not_go_together(here, given, words):
    done = here.exec("true", given=given, status=2)
    refused(done, "USAGE")
    assert words in done.stderr


def test_the_program_itself_is_not_in_the_package_with_fd(here):
    refused(here.exec("{weights.bin}", given=FD, status=127), "COMMAND_ABSENT", "Use --at and --executable")


def test_no_command(here):
    done = run("exec", here.vendor.package, "--fd", status=2, env=here.environment)
    assert "reason: USAGE" in done.stderr


FORBIDDEN = (
    'echo 0 >/proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin -- "$@"'
)


def test_where_namespaces_are_forbidden(here):
    """As in containers: neither the right to make them, nor a user namespace that gives it."""

    def forbidden(*how):
        words = [PROGRAM, "exec", here.vendor.package, *how, "--", "sh", "-c", "cat $0", "{labels/names.txt}"]
        words = ["unshare", "--user", "--map-root-user", "sh", "-c", FORBIDDEN, "sh", *words]
        return subprocess.run(words, env=here.environment, capture_output=True, text=True, check=False)

    done = forbidden("--at", here.at)
    assert done.returncode == 5, done.stderr
    refused(done, "NAMESPACES_REFUSED", "Use --fd, which needs none")
    done = forbidden("--fd")
    assert (done.returncode, done.stdout) == (0, "bolt\nnut\n"), done.stderr


@pytest.mark.parametrize("limit", [80, 100, 120, 160])
def test_little_memory(here, how, limit):
    """Whatever fails, it says so, and nothing runs by halves."""
    most = limit << 20

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    done = here.exec("sh", "-c", "echo ran", given=how, status=None, preexec_fn=limited)
    if done.returncode == 0:
        assert done.stdout == "ran\n"
    else:
        assert done.stdout == ""
        assert done.returncode in {5, 126, 3} or "error:" not in done.stderr  # Python itself may not start


@pytest.mark.parametrize("most", [7, 9, 12, 15, 20])
def test_few_descriptors(here, how, most):
    def limited():
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    done = here.exec("sh", "-c", "echo ran", given=how, status=None, preexec_fn=limited)
    assert done.stdout == ("ran\n" if done.returncode == 0 else "")
    assert done.returncode == 0 or "error:" in done.stderr, done.stderr


def test_files_may_not_grow(here, how):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    refused(here.exec("true", given=how, status=5, preexec_fn=limited), "STORAGE")


def test_standard_streams_that_are_closed(here, how):
    script = f"ls /proc/self/fd >{here.folder}/fds"
    words = [PROGRAM, "exec", here.vendor.package, *map(str, how), "--", "sh", "-c", script]
    shell = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *words]
    done = subprocess.run(shell, env=here.environment, timeout=60, check=False)
    assert done.returncode == 0
    assert (here.folder / "fds").stat().st_size > 0


# ---- C


def compiled(folder, text, *flags):
    source = folder / ("program.cc" if "c++" in str(flags) else "program.c")
    source.write_text(textwrap.dedent(text))
    include = run("exec", "--include-dir").stdout.strip()
    compiler = "c++" if source.suffix == ".cc" else "cc"
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run([compiler, *flags, *warnings, f"-I{include}", source, "-o", folder / "program"], check=True)
    return folder / "program"


PROGRAM_IN_C = """
    #include <hwlicense.h>

    static void tell(int result, const struct hwlicense_refusal *refusal)
    {
        if (result == 1)
            printf("%s %d\\n", refusal->reason, refusal->wait > 3500 && refusal->wait < 4000);
        else
            printf("%d\\n", result);
    }

    int main(void)
    {
        struct hwlicense_refusal refusal;
        int license = hwlicense_connect(), other = hwlicense_connect();
        if (license < 0) {
            printf("errno %d\\n", errno == ENOTCONN);
            return 1;
        }
        tell(hwlicense_session(license, 2, &refusal), &refusal);
        tell(hwlicense_standing(other, 60, 1, &refusal), &refusal);
        tell(hwlicense_spend(other, 1, &refusal), &refusal);
        tell(hwlicense_spend(other, 1, &refusal), &refusal);
        tell(hwlicense_spend(license, 2, &refusal), &refusal);
        tell(hwlicense_end(license, &refusal), &refusal);
        tell(hwlicense_spend(license, 0, &refusal), &refusal);
        printf("%d\\n", hwlicense_spend(license, 1, 0));
        close(license);
        return 0;
    }
"""


@pytest.mark.parametrize("flags", [["-std=c99"], ["-std=c17"], ["-std=c++11"]])
def test_the_header(vendor, tmp_path, flags):
    terms = 'licensee = "A"\nproduct = "p"\n[limits]\nrates = ["3/hour"]\n'
    program = compiled(tmp_path, PROGRAM_IN_C, *flags)
    outside = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (outside.stdout, outside.returncode) == ("errno 1\n", 1)
    with shop(vendor, tmp_path, terms) as limited:
        done = limited.exec(program)
    assert done.stdout.splitlines() == ["0", "0", "0", "RATE_EXCEEDED 1", "0", "0", "USAGE 0", "1"]


ASKED_IN_C = """
    #include <hwlicense.h>

    int main(int count, char **answer)
    {
        struct hwlicense_refusal refusal = {"", 0};
        int ends[2], result;
        if (count != 2 || socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
            return 1;
        if (write(ends[1], answer[1], strlen(answer[1])) < 0 || shutdown(ends[1], SHUT_WR))
            return 1;
        result = hwlicense_ask(ends[0], "spend 1\\n", &refusal);
        printf("%d %s %.3f\\n", result, refusal.reason, refusal.wait);
        return 0;
    }
"""


def test_what_the_header_makes_of_answers(tmp_path):
    program = compiled(tmp_path, ASKED_IN_C, "-std=c99", "-fsanitize=address,undefined")
    reason = "R" * 63
    for answer, result in (
        ("ok\n", "0  0.000"),
        ("no RATE_EXCEEDED 59.124\n", "1 RATE_EXCEEDED 59.124"),
        ("no RATE_EXCEEDED 0.5\nno more", "1 RATE_EXCEEDED 0.500"),
        ("no LICENSE_EXPIRED -\n", "1 LICENSE_EXPIRED -1.000"),
        (f"no {reason} 1\n", f"1 {reason} 1.000"),
        *((wrong, "-1  0.000") for wrong in ("", "ok", "\n", "no\n", "no \n", "no X\n", "no  1", "yes\n", "OK\n")),
        ("no RATE_EXCEEDED 9999999999.999999999\n", "1 RATE_EXCEEDED 10000000000.000"),
        *((f"no X {wrong}\n", "-1  0.000") for wrong in ("12345678901", "9" * 100, "1.1234567890", "1x", "-1", "--")),
        *((f"no X {wrong}\n", "-1  0.000") for wrong in ("1.2.3", ".", ".5", "1.", "inf", "nan", "1e9", "0x1", "+1")),
        *((wrong, "-1  0.000") for wrong in (f"no {reason}R 1\n", "x" * 300, "no " + "X" * 125 + " 1\n")),
    ):
        done = subprocess.run([program, answer], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == (f"{result}\n", ""), answer


COUNTED_IN_C = """
    #include <hwlicense.h>
    #include <limits.h>

    static int told(int result, struct hwlicense_refusal *refusal)
    {
        return result == 1 && !strcmp(refusal->reason, "USAGE") && refusal->wait < 0;
    }

    int main(void)
    {
        struct hwlicense_refusal one, two, three, four;
        int ends[2];
        char line[64];
        ssize_t size;
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
            return 1;
        printf("%d", told(hwlicense_spend(ends[0], ULONG_MAX, &one), &one));
        printf("%d", told(hwlicense_session(ends[0], 10000000000UL, &two), &two));
        printf("%d", told(hwlicense_standing(ends[0], ULONG_MAX, 1, &three), &three));
        printf("%d", told(hwlicense_standing(ends[0], 1, ULONG_MAX, &four), &four));
        printf("%d", hwlicense_spend(ends[0], ULONG_MAX, 0));
        printf(" %d", recv(ends[1], line, sizeof line, MSG_DONTWAIT) < 0 && errno == EAGAIN);
        if (write(ends[1], "ok\\n", 3) != 3 || hwlicense_standing(ends[0], 9999999999UL, 9999999999UL, 0))
            return 1;
        size = recv(ends[1], line, sizeof line - 1, 0);
        line[size < 0 ? 0 : size] = 0;
        printf(" %s", line);
        return 0;
    }
"""


def test_a_number_that_is_too_large_for_a_line_is_not_asked_for(tmp_path):
    """The server would end the connection."""
    program = compiled(tmp_path, COUNTED_IN_C, "-std=c99", "-fsanitize=address,undefined")
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("11111 1 standing 9999999999 9999999999\n", "")


def test_the_header_is_where_it_is_said_to_be():
    folder = Path(run("exec", "--include-dir").stdout.strip())
    assert folder == Path(hwlicense.__file__).parent / "include"
    assert (folder / "hwlicense.h").is_file()


def test_help_names_what_a_program_finds(here):
    text = run("exec", "--help", env=here.environment).stdout
    for name in ("HWLICENSE_SOCKET", "HWLICENSE_FDS", "SIGTERM"):
        assert name in text
