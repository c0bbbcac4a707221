"""mdpo/rollouts/sandbox.py against programs that want out: each is really run, and looked for afterwards."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from errors import refused
from repository import ROOT

from mdpo.rollouts import sandbox
from mdpo.rollouts.sandbox import ENVIRONMENT, Limits, Sandbox

LONG = 120  # seconds that nothing here takes
QUICK = Limits(seconds=3.0)
UNPRIVILEGED = 65534


@pytest.fixture(scope="module")
def box():
    return Sandbox(Limits(seconds=LONG))


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "without"])
def either(request):
    """With namespaces and without: what holds in both."""
    return Sandbox(Limits(seconds=LONG), namespaces=request.param)


def processes_with(mark: str) -> list[int]:
    """Numbers of the living processes that have `mark` in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and mark.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def gone(mark: str) -> bool:
    """Whether they are all gone, after a while."""
    end = time.monotonic() + 30
    while processes_with(mark) and time.monotonic() < end:
        time.sleep(0.05)
    return not processes_with(mark)


HARMLESS = {
    "value": ("print(6 * 7)", "ok", "42\n"),
    "nothing printed": ("6 * 7", "ok", ""),
    "unicode": ("é = 'π🎉'\nprint(é)", "ok", "π🎉\n"),
    "bytes that are no text": ("import sys; sys.stdout.buffer.write(b'a\\xff')", "ok", "a\ufffd"),
    "exit 0": ("import sys; print(1); sys.exit()", "ok", "1\n"),
    "exit 3": ("import sys; print(1); sys.exit(3)", "error", "1\n"),
    "killed": ("import os, signal; print(1); os.kill(os.getpid(), signal.SIGKILL)", "error", "1\n"),
    "main guard": ("if __name__ == '__main__': print(1)", "ok", "1\n"),
    "packages": ("import sympy, numpy\nprint(sympy.sqrt(8), numpy.arange(3).sum())", "ok", "2*sqrt(2) 3\n"),
    "imports of the folder": ("open('own.py', 'w').write('x = 5')\nimport sys\nsys.path.insert(0, '')\n"
                              "import own\nprint(own.x)", "ok", "5\n"),
    "devices": ("open('/dev/null', 'w').write('x')\nprint(len(open('/dev/urandom', 'rb').read(4)))", "ok", "4\n"),
    "arguments": ("import sys; print(sys.argv)", "ok", "['main.py']\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_programs(name, either):
    code, ended, output = HARMLESS[name]
    result = either.run(code)
    assert (result.ended, result.output) == (ended, output)


ERRORS = {
    "1 / 0": "ZeroDivisionError: division by zero",
    "def f(:": "SyntaxError: invalid syntax",
    "input()": "EOFError: EOF when reading a line",
    "def f(): f()\nf()": "RecursionError: maximum recursion depth exceeded",
    "x = '\0'": "SyntaxError: source code ",
    "import no_such_package": "ModuleNotFoundError: No module named 'no_such_package'",
}


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_shows_its_traceback_alone(code, either):
    result = either.run(code)
    assert result.ended == "error"
    assert result.output.strip().splitlines()[-1].startswith(ERRORS[code])
    assert "<string>" not in result.output and "exec(" not in result.output  # no frame of ours


def test_infinite_loop_and_sleep_end_at_the_limit():
    boxes = [Sandbox(QUICK, namespaces) for namespaces in (True, False)]
    codes = ["print('before')\nwhile True: pass", "import time\nprint('before')\ntime.sleep(1000)"]
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda job: job[0].run(job[1]), [(box, code) for box in boxes for code in codes]):
            assert (result.ended, result.output) == ("timeout", "before\n")
            assert result.seconds >= QUICK.seconds


def test_memory_hog_and_flood(either):
    assert either.run("x = [0] * 10**10").ended == "memory"
    assert either.run("x = b''\nwhile True: x += bytes(2**28)").ended == "memory"
    for code in ("while True: print('x' * 1000)", "import sys\nwhile True: sys.stderr.write('x' * 1000)"):
        result = either.run(code)
        assert result.ended == "flood" and 0.99 * 2**16 < len(result.output) <= 2**16


def test_output_of_exactly_the_limit_is_no_flood(either):
    most = 2**16
    assert either.run(f"print('x' * {most - 1})").ended == "ok"
    assert either.run(f"print('x' * {most})").ended == "flood"


def test_files_are_small_stay_inside_and_vanish(either, tmp_path):
    before = set(Path(sandbox.tempfile.gettempdir()).glob("mdpo-sandbox-*"))
    assert "File too large" in either.run("open('big', 'wb').write(bytes(2**25))").output
    assert either.run("open('left-behind.txt', 'w').write('x'); print(1)").output == "1\n"
    assert not Path("left-behind.txt").exists()
    assert set(Path(sandbox.tempfile.gettempdir()).glob("mdpo-sandbox-*")) <= before


def test_the_memory_of_tmp_is_limited(box):
    code = "for i in range(20):\n    open(f'f{i}', 'wb').write(bytes(2**23))"  # 160 MiB in files of 8
    assert "No space left on device" in box.run(code).output


def test_environment_is_empty(either, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = either.run("import os\nprint({k: v for k, v in os.environ.items() if k != 'LC_CTYPE'})")
    assert result.output == f"{ENVIRONMENT}\n"  # Python sets LC_CTYPE itself


def test_a_token_cannot_be_read_from_the_parent(box, monkeypatch):
    """/proc would give it to any process of the same user."""
    code = f"print('hf_' in open('/proc/{os.getppid()}/environ').read())"
    assert "FileNotFoundError" in box.run(code).output
    assert box.run("import os\nprint(os.path.exists('/proc/self'), os.getpid())").output == "False 2\n"


def test_other_files_cannot_be_seen_nor_written(box, tmp_path):
    (tmp_path / "secret").write_text("x")
    target = tmp_path / "written"
    for path in (tmp_path / "secret", "/etc/passwd", Path(__file__), "/proc/self/environ", "/run", "/sys"):
        assert box.run(f"import os; print(os.path.exists({str(path)!r}))").output == "False\n", path
    hostile = f"""
import os, sys
for path in ({str(target)!r}, '/written', '/usr/written', sys.prefix + '/written', os.__file__):
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, 'w')
        print('written', path)
    except OSError as error:
        print(error.strerror)
"""
    lines = box.run(hostile).output.splitlines()
    assert lines[0] == f"written {target}" and not target.exists()  # in a /tmp of its own
    assert len(lines) == 5 and set(lines[1:]) <= {"Read-only file system", "Permission denied"}


def test_the_program_has_no_rights_and_cannot_take_any(box):
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(os.getuid() != 0, os.geteuid() != 0, os.getgroups() in ([], [65534], [os.getgid()]))
print(libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/tmp", 2))
print(libc.chroot(b"/tmp"), libc.setuid(0), libc.prctl(39, 0, 0, 0, 0))  # 39: no new privileges?
"""
    assert box.run(code).output == "True True True\n-1 -1 -1\n-1 -1 1\n"


def test_network_is_out_of_reach(box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, heard = server.getsockname()[1], []
        server.settimeout(LONG)
        thread = threading.Thread(target=lambda: heard.append(server.accept()[0].recv(10)), daemon=True)
        thread.start()
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5).send(b'out')\nprint('sent')"
        assert "unreachable" in box.run(code).output and not heard
        # The same program is heard where nothing is kept apart: the listener works.
        assert Sandbox(Limits(seconds=LONG), namespaces=False).run(code).output == "sent\n"
        thread.join(LONG)
        assert heard == [b"out"]


def test_children_end_with_their_parent(box):
    """Even one that left its session and its parent, and holds the output open; the run does not wait for it."""
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    code = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)', {mark!r}], start_new_session=True)
print('started')
"""
    result = box.run(code)
    assert (result.ended, result.output) == ("ok", "started\n") and result.seconds < LONG
    assert gone(mark)


def test_children_in_the_session_end_without_namespaces_too():
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    code = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)', {mark!r}])"
    )
    assert Sandbox(Limits(seconds=LONG), namespaces=False).run(code).ended == "ok"
    assert gone(mark)


def test_fork_bomb():
    """Every process forks for ever. Their number is limited, so that the machine goes on; all are gone afterwards."""
    mark = f"bomb_{os.getpid()}_{time.monotonic_ns()}"
    most = {"count": 0}
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            most["count"] = max(most["count"], len(processes_with(mark)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    bomb = f"""
import os, sys, time
if len(sys.argv) == 1:  # again with the mark in the command line
    os.execv(sys.executable, [sys.executable, '-c', open('main.py').read(), {mark!r}])
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
"""
    result = Sandbox(QUICK).run(bomb)
    stop.set()
    watcher.join()
    assert result.ended == "timeout"
    assert 2 < most["count"] <= QUICK.processes
    assert gone(mark)


def test_runs_side_by_side_do_not_share_the_limit_of_processes(box):
    code = """
import os, time
for _ in range(10):
    if os.fork() == 0:
        time.sleep(1)
        os._exit(0)
for _ in range(10):
    os.wait()
print('done')
"""
    with ThreadPoolExecutor(4) as pool:
        assert [r.output for r in pool.map(box.run, [code] * 4)] == ["done\n"] * 4


def test_a_killed_evaluation_leaves_nothing_running(tmp_path):
    mark = f"mark_{os.getpid()}_{time.monotonic_ns()}"
    program = f"""
import os, sys
if len(sys.argv) == 1:
    os.execv(sys.executable, [sys.executable, '-c', open('main.py').read(), {mark!r}])
while True: pass
"""
    script = f"from mdpo.rollouts.sandbox import *\nSandbox(Limits(seconds={LONG})).run({program!r})"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # its folder stays behind
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment)
    end = time.monotonic() + LONG

    def running():  # the parent's own command line has the mark too
        return [p for p in processes_with(mark) if p != parent.pid]

    while not running() and time.monotonic() < end:
        time.sleep(0.05)
    assert running()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(mark)


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="changes to another user, or gives a right of root's up")


KILLERS = (
    "os.kill(0, signal.SIGKILL)",
    "os.kill(os.getppid(), signal.SIGINT)",
    "os.kill(os.getppid(), signal.SIGKILL)",
)


def survives_its_killers(box: Sandbox) -> None:
    """Signals to the launcher and to pid 1 end at most the program: the next one runs."""
    for killer in KILLERS:
        found = box.run(f"import os, signal\ntry:\n    {killer}\nexcept PermissionError:\n    pass")
        assert found.ended in ("ok", "error") and "Traceback" not in found.output, (killer, found)
        assert box.run("print(1)").output == "1\n"


def test_a_program_that_kills_its_launcher_is_an_error_of_its_own(either):
    survives_its_killers(either)


@root_only
def test_an_ordinary_user_gets_the_same(tmp_path, monkeypatch):
    """In a user namespace, which root does without. The system's Python: this one may be out of that user's reach."""
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no /usr/bin/python3")
    child = Path(sandbox.tempfile.mkdtemp()) / "child.py"
    child.write_text(sandbox.CHILD.read_text())
    child.parent.chmod(0o755)
    popen = subprocess.Popen

    def as_another(*args, cwd, **kwargs):
        for path in (cwd, f"{cwd}/main.py"):
            os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
        return popen(*args, cwd=cwd, user=UNPRIVILEGED, group=UNPRIVILEGED, extra_groups=[], **kwargs)

    monkeypatch.setattr(sandbox.subprocess, "Popen", as_another)
    monkeypatch.setattr(sandbox, "CHILD", child)
    monkeypatch.setattr(sandbox.sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(sandbox.sys, "base_prefix", "/usr")
    monkeypatch.setattr(sandbox.sys, "base_exec_prefix", "/usr")
    monkeypatch.setattr(sandbox.sysconfig, "get_path", lambda name: "/usr/lib/python3/dist-packages")
    box = Sandbox(Limits(seconds=LONG))
    assert box.run("import os; print(os.getuid(), os.listdir('/tmp'))").output == "1000 ['main.py']\n"
    test_the_program_has_no_rights_and_cannot_take_any(box)
    assert "unreachable" in box.run("import socket; socket.create_connection(('127.0.0.1', 1), 5)").output
    assert box.run("import os; print(os.path.exists('/proc/self'), os.path.exists('/home'))").output == "False False\n"
    survives_its_killers(box)
    forks = "import os, time\nfor _ in range(50):\n    if os.fork() == 0: time.sleep(1000)"
    assert "BlockingIOError" in box.run(forks).output
    child.unlink()


INNER = "inner one"  # /proc writes its blank as \\040


def with_mounts(folder: str, user: int | None):
    """For a process between fork and exec: a tmpfs for all to write inside `folder`, and another one inside that, in
    a mount namespace that ends with the process; then `user` in place of root."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private, nosuid_nodev_noexec = 0x00020000, 16384 | 1 << 18, 2 | 4 | 8

    def done(result):
        if result:
            raise OSError(ctypes.get_errno(), "mount")

    def prepare():
        done(libc.unshare(new_namespace))
        done(libc.mount(b"none", b"/", None, private, None))
        for path in (f"{folder}/{INNER}", f"{folder}/{INNER}/deeper"):
            os.makedirs(path, exist_ok=True)
            done(libc.mount(b"tmpfs", path.encode(), b"tmpfs", nosuid_nodev_noexec, b"mode=1777"))
            Path(path, "there").write_text(path[-5:])
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)

    return prepare


WRITES = """
import ctypes, os
for place in ({0!r}, {0!r} + '/deeper'):
    try:
        print(open(place + '/there').read(), end=' ')
        print(open(place + '/new', 'w').write('x'))
    except OSError as error:
        print(error.strerror)
"""


@root_only
@pytest.mark.parametrize("user", [None, UNPRIVILEGED], ids=["root", "ordinary user"])
def test_mounts_inside_bound_folders_are_read_only_too(user, monkeypatch, request):
    """Each has flags of its own, which a recursive bind keeps."""
    folder = Path(sandbox.tempfile.mkdtemp())  # pytest's own folders are for one user
    request.addfinalizer(lambda: shutil.rmtree(folder))
    folder.chmod(0o755)
    inner = f"{folder}/{INNER}"
    os.mkdir(inner)
    try:
        outside = subprocess.run(
            ["/usr/bin/python3", "-c", WRITES.format(inner)],
            preexec_fn=with_mounts(str(folder), user),
            capture_output=True,
            text=True,
        )
    except subprocess.SubprocessError:
        pytest.skip("mounting is not permitted here")
    assert outside.stdout == "r one 1\neeper 1\n"  # writable where nothing is kept apart
    child = folder / "child.py"
    child.write_text(sandbox.CHILD.read_text())
    popen = subprocess.Popen

    def started(*args, cwd, **kwargs):
        for path in (cwd, f"{cwd}/main.py"):
            os.chown(path, user or 0, user or 0)
        return popen(*args, cwd=cwd, preexec_fn=with_mounts(str(folder), user), **kwargs)

    monkeypatch.setattr(sandbox.subprocess, "Popen", started)
    monkeypatch.setattr(sandbox, "CHILD", child)
    monkeypatch.setattr(sandbox.sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(sandbox.sys, "base_prefix", "/usr")
    monkeypatch.setattr(sandbox.sys, "base_exec_prefix", "/usr")
    monkeypatch.setattr(sandbox.sysconfig, "get_path", lambda name: str(folder))
    refused = "Read-only file system"
    assert Sandbox(Limits(seconds=LONG)).run(WRITES.format(inner)).output == f"r one {refused}\neeper {refused}\n"


@root_only
def test_where_namespaces_are_refused_nothing_is_run(monkeypatch):
    """As in a container: root without the right to make them."""
    popen, libc = subprocess.Popen, ctypes.CDLL(None)
    drop, admin = 24, 21  # PR_CAPBSET_DROP, CAP_SYS_ADMIN
    monkeypatch.setattr(
        sandbox.subprocess, "Popen", lambda *a, **k: popen(*a, preexec_fn=lambda: libc.prctl(drop, admin, 0, 0, 0), **k)
    )
    with refused("sandbox", "unshare: Operation not permitted", "allow_unisolated"):
        Sandbox()
    assert Sandbox(namespaces=False).run("print(1)").output == "1\n"


def test_a_python_that_does_not_start_is_an_error():
    with refused("sandbox", "Python"):
        Sandbox(Limits(memory_mb=1))
