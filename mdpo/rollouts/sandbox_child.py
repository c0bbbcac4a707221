"""The inside of `mdpo.rollouts.sandbox`, started as `python -I -S sandbox_child.py JSON`: not a module to import.

launcher ── pid 1 of a process namespace ── the program     (namespaces)
launcher ── the program                                      (without)

The launcher builds the sandbox, starts the program in it, waits, and writes one JSON object to `status_fd`: {"refused":
why} where the kernel does not allow it, else {"status": the program's wait status}. The launcher and pid 1 run no
code of the program's, so that killing their process group always ends the namespace, and with it every process in it.
"""

import ctypes
import errno
import json
import os
import re
import resource
import signal
import sys

MiB = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
UNREACHABLE = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.EACCES)  # of a mount that another covers, or a folder
DIE_WITH_PARENT, NO_NEW_PRIVILEGES = 1, 38  # of prctl
# What a Python needs of a system; links stay links (/bin is one to /usr/bin on many).
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
INSIDE_ID = 1000  # user and group in a user namespace: not 0, so that starting Python drops its capabilities
FIRST_ID = 1_900_000_000  # as root, each sandbox is a user of its own: RLIMIT_NPROC counts by user
# Runs main.py, and shows a traceback without the frame of this text. sys.path gets the packages, but no .pth file runs.
RUN = """import sys, traceback
sys.path += sys.argv[1:]
sys.argv = ["main.py"]
try:
    exec(compile(open("main.py", encoding="utf-8").read(), "main.py", "exec"), {"__name__": "__main__"})
except Exception as error:
    traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))
    sys.exit(1)"""


def checked(result: int, call: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    words = (source.encode(), target.encode(), kind and kind.encode())
    checked(libc.mount(*words, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def main(order: dict) -> int:
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    # A program's SIGINT would raise in Python's handler: without one it ends the launcher, and pid 1 does not get it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    say = os.fdopen(order["status_fd"], "w")  # closed on exec: the program does not have it
    os.set_inheritable(say.fileno(), False)
    try:
        child = isolated(order, say) if order["namespaces"] else os.fork() or program(order, say)
        _, status = os.waitpid(child, 0)
    except OSError as error:
        say.write(json.dumps({"refused": error.strerror or str(error)}))
        return 1
    if not order["namespaces"]:
        say.write(json.dumps({"status": status}))
    return 0


def isolated(order: dict, say) -> int:
    """Starts pid 1 of new namespaces, which starts the program and reports for it; its number out here."""
    root = os.geteuid() == 0
    with open("main.py", encoding="utf-8") as file:
        code = file.read()
    if root:
        checked(libc.unshare(NEWNS | NEWIPC | NEWPID | NEWNET), "unshare")
    else:
        user, group = os.geteuid(), os.getegid()
        checked(libc.unshare(NEWUSER | NEWNS | NEWIPC | NEWPID | NEWNET), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE_ID} {user} 1"),
                           ("gid_map", f"{INSIDE_ID} {group} 1")):  # fmt: skip
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)  # new credentials forget it
    build_root(order)
    own_id = FIRST_ID + os.getpid() if root else None
    if pid := os.fork():
        return pid
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    try:
        os.chroot(order["folder"])
        os.chdir("/tmp")
        with open("main.py", "w", encoding="utf-8") as file:
            file.write(code)
        child = os.fork() or program(order, say, own_id)
        status = None
        while status is None:  # orphans become children of pid 1 too
            pid, ended = os.wait()
            status = ended if pid == child else None
        say.write(json.dumps({"status": status}))
    except OSError as error:
        say.write(json.dumps({"refused": error.strerror or str(error)}))
    say.flush()
    os._exit(0)


def build_root(order: dict) -> None:
    """Makes the folder a file system of its own: Python, the system's libraries and four devices, all read-only with
    what is mounted inside them, and a small /tmp in memory. No /home, no /proc, no sockets of services, and nothing
    from other folders."""
    root, private = order["folder"], NOSUID | NODEV
    mount("none", "/", None, REC | PRIVATE)  # nothing of this is seen outside
    mount("tmpfs", root, "tmpfs", private, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")  # before what may be below /tmp, such as a virtual environment
    mount("tmpfs", f"{root}/tmp", "tmpfs", private, f"size={order['folder_mb']}m,mode=1777")
    for path in dict.fromkeys([*SYSTEM, *DEVICES, *order["python"]]):
        target = root + path
        if not os.path.lexists(path) or os.path.lexists(target):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        os.mkdir(target) if os.path.isdir(path) else os.close(os.open(target, os.O_CREAT))
        mount(path, target, None, BIND | REC)
        restrict(target, NOSUID if path in DEVICES else RDONLY | private)
        for inner in mounts_below(target):  # a remount reaches one mount, not those that came along
            try:
                restrict(inner, RDONLY | private)
            except OSError as error:
                if error.errno not in UNREACHABLE:
                    raise
    mount("tmpfs", root, None, REMOUNT | BIND | RDONLY | private)


def restrict(target: str, flags: int) -> None:
    """Puts flags on the topmost mount at `target`."""
    locked = os.statvfs(target).f_flag & (NOSUID | NODEV | NOEXEC)  # a user namespace may not take these off
    mount("none", target, None, BIND | REMOUNT | flags | locked)


def mounts_below(folder: str) -> list[str]:
    """Where this process has mounts inside a folder, from the kernel's list, which writes a blank as `\\040`."""
    with open("/proc/self/mountinfo", "rb") as file:
        points = [line.split()[4] for line in file]
    names = [os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), point)) for point in points]
    return [name for name in names if name.startswith(folder + "/")]


def program(order: dict, say, own_id: int | None = None) -> None:
    """Becomes the program, with nothing but the limits. Never returns."""
    try:
        if own_id is not None:
            os.setgroups([])
            os.setresgid(own_id, own_id, own_id)
            os.setresuid(own_id, own_id, own_id)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        cpu = int(order["seconds"]) + 2  # where the wall-clock limit does not take effect
        limits = {"CPU": cpu, "AS": order["memory_mb"] * MiB, "FSIZE": order["file_mb"] * MiB, "CORE": 0}
        if order["namespaces"]:  # else it counts whatever the user runs, and does not apply to root
            limits["NPROC"] = order["processes"]
            os.setsid()  # a signal to its own process group does not reach the launcher
        for name, most in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
        python = [order["executable"], "-I", "-S", "-B", "-X", "utf8", "-u", "-c", RUN, *order["packages"]]
        os.execve(python[0], python, order["environment"])
    except OSError as error:
        say.write(json.dumps({"refused": f"{order['executable']}: {error.strerror}"}))
        say.flush()
    finally:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
