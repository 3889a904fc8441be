"""Restricts a process that opens clients' files: Landlock by raw system calls, and resource limits.

Landlock (Linux 5.13 and later) needs no privileges and cannot be undone: after `confine` this process, and all that it
forks, can only open the given paths. `confine` skips and returns what the kernel lacks; `doctor` shows it.
It does not cover UDP, nor sockets that are files.
"""

from __future__ import annotations

import ctypes
import os
import resource
import stat
import struct
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_PATH_BENEATH, _NET_PORT = 1, 2
_PR_SET_NO_NEW_PRIVS = 38

# The bits of linux/landlock.h.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REMOVE_DIR, _MAKE_DIR, _REFER = 1 << 4, 1 << 7, 1 << 13
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_CONNECT_TCP = 2
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# A rule for a file may only name what can be done to one.
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_FILE_RIGHTS_NOW = (1 << 16) - 1
# The first one that lets a folder be renamed into another one.
_RANK_VERSION = 2
_SCOPE_SIGNALS = 2
_SCOPES = 1 | _SCOPE_SIGNALS  # Abstract sockets too stay within the confined processes; over them NCCL's ranks meet.

# Renames a folder into another one that is written by others too.
_PUT = _REMOVE_DIR | _MAKE_DIR | _REFER

# DAC_OVERRIDE and DAC_READ_SEARCH; of linux/capability.h.
_CAPABILITIES = 1 << 1 | 1 << 2
# IPC_LOCK and SYS_NICE: memory that a network card reads, and memory near to its processor.
_RANK_CAPABILITIES = _CAPABILITIES | 1 << 14 | 1 << 23
_CAPABILITY_VERSION = 0x20080522

_SYSTEM = ("/usr", "/lib", "/lib64", "/opt", "/proc", "/sys", "/run/systemd/resolve")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/shm")
_ETC = (
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "ssl", "ca-certificates", "pki", "mime.types"),
    *("resolv.conf", "hosts", "host.conf", "nsswitch.conf", "gai.conf", "services", "protocols"),
)
_RANK_ETC = (
    *(
        "python3",
        f"python{sys.version_info[0]}.{sys.version_info[1]}",
        "alternatives",
        "OpenCL",
        "vulkan",
        "machine-id",
    ),
    *("nccl.conf", "nvidia", "libibverbs.d", "ucx", "numactl", "timezone"),
)
# Drivers' files: NVIDIA and AMD GPUs, GPUs under Windows, network cards.
_RANK_DEVICES = ("nvidia*", "dri", "kfd", "dxg", "infiniband", "gdrdrv")
# Stores that keep libraries outside of the usual folders, and where containers keep drivers.
_RANK_SYSTEM = ("/nix/store", "/gnu/store", "/run/opengl-driver", "/run/nvidia")

Identities = tuple[tuple[int, int] | None, ...]


def landlock_version() -> int:
    """The version of the kernel's Landlock; 0: it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, _syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG))


def confine(reads: Iterable[str], writes: Iterable[str], *, hidden: str, ports: Iterable[int] = ()) -> dict[str, str]:
    """Leaves this process the environment and `reads` to read, `writes` to write, and TCP to `ports`.

    Folders of the environment that hold `hidden` are not opened as a whole. Returns what holds from here on, in words.
    """
    version = landlock_version()
    if not version:
        return {"landlock": "not available: the kernel has none", "files": "all that the account may read"}
    handled = _FILE_RIGHTS.get(version, _FILE_RIGHTS_NOW)
    ports = sorted(set(ports))
    net = 3 if version >= 4 else 0
    fields = (handled, net, _SCOPES) if version >= 6 else (handled, net) if version >= 4 else (handled,)
    ruleset = _new_ruleset(fields)
    try:
        for path in _environment(hidden):
            _allow_path(ruleset, path, _READ & handled)
        for path in reads:
            _allow_path(ruleset, path, _READ & handled)
        for path in (*writes, *_DEVICES):
            _allow_path(ruleset, path, handled)
        if net:
            for port in ports:
                _allow_port(ruleset, port)
        drop_capabilities()
        _restrict(ruleset)
    finally:
        os.close(ruleset)
    tcp = f"TCP to the ports {', '.join(map(str, ports))} alone" if ports else "no TCP"
    return {
        "landlock": f"version {version}",
        "files": "the environment, data roots, storage and caches",
        "network": tcp if net else "not confined: the kernel's Landlock has no rules for TCP",
        "signals": "to its own kind alone" if version >= 6 else "not confined",
    }


def confine_rank(reads: Iterable[str], writes: Iterable[str], puts: Iterable[str], *, hidden: str) -> bool:
    """Confines this thread, and all that it starts, to some files, and to signals among themselves.

    No rule for the network, over which ranks meet.

    Beside `confine`'s environment: drivers of GPUs and network cards, the folders of commands and libraries that
    environment variables name, and its own part of /proc to write. Into `puts` folders can be renamed, and no file in
    them can be written. Returns whether that holds now. Raises: OSError.
    """
    version = landlock_version()
    if version < _RANK_VERSION:
        return False
    handled = _FILE_RIGHTS.get(version, _FILE_RIGHTS_NOW)
    ruleset = _new_ruleset((handled, 0, _SCOPE_SIGNALS) if version >= 6 else (handled,))
    try:
        for path in (*_environment(hidden), *_rank_environment(hidden), *reads):
            _allow_path(ruleset, path, _READ & handled)
        for path in puts:
            _allow_path(ruleset, path, (_READ | _PUT) & handled)
        devices = [str(device) for name in _RANK_DEVICES for device in Path("/dev").glob(name)]
        for path in (*writes, *_DEVICES, *devices, f"/proc/{os.getpid()}"):
            _allow_path(ruleset, path, handled)
        drop_capabilities(_RANK_CAPABILITIES)
        _restrict(ruleset)
    finally:
        os.close(ruleset)
    return True


def rank_words() -> str:
    """What holds for ranks on this machine's kernel, as `doctor` shows it."""
    version = landlock_version()
    if version >= _RANK_VERSION:
        return "read the same, and write their job's folder, its export and the caches"
    return f"not confined: Landlock has version {version}, and they need {_RANK_VERSION} (Linux 5.19)"


def identities(paths: Iterable[str]) -> Identities:
    """Device and inode of each path, to which a rule applies; None if it cannot be examined."""
    found: list[tuple[int, int] | None] = []
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 - a path as text, at every question.
            found.append((status.st_dev, status.st_ino))
        except OSError:
            found.append(None)
    return tuple(found)


def drop_capabilities(kept: int = _CAPABILITIES) -> None:
    """Leaves an account with capabilities, such as root, those to files: Landlock says which files."""
    if sys.platform != "linux":
        return
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    held = ctypes.create_string_buffer(24)
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.capget(header, held), "capget")
    effective, permitted, *_ = struct.unpack("=6I", held.raw)
    left = struct.pack("=6I", effective & kept, permitted & kept, 0, 0, 0, 0)
    _checked(libc.capset(header, left), "capset")


def forbid_network() -> None:
    """Takes TCP away from this process, on top of what holds already; nothing if the kernel cannot."""
    version = landlock_version()
    if version >= 4:
        ruleset = _new_ruleset((0, 3))
        try:
            _restrict(ruleset)
        finally:
            os.close(ruleset)


def limit_memory(more_bytes: int) -> None:
    """Lets this process take this much more memory than it has, and twice that with mapped files."""
    sizes = _sizes()
    resource.setrlimit(resource.RLIMIT_DATA, (sizes["VmData"] + more_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (sizes["VmSize"] + 2 * more_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(more_s: float) -> None:
    """Ends this process (SIGXCPU) when it has computed for so much longer."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + more_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def open_paths(hidden: str) -> list[str]:
    """What confined processes and ranks can read whatever a job names: programs, libraries, the system's settings."""
    return [*_environment(hidden), *_rank_environment(hidden)]


def _environment(hidden: str) -> list[str]:
    """Python, its packages and the system's libraries."""
    named = [*sys.path, *(path for path in sysconfig.get_paths().values()), sys.prefix, sys.base_prefix]
    named += [os.path.dirname(os.path.realpath(sys.executable)), *_SYSTEM, *(f"/etc/{name}" for name in _ETC)]  # noqa: PTH120
    found = []
    for path in dict.fromkeys(named):
        if not path or not Path(path).exists():
            continue
        if holds(path, hidden):
            # A virtual environment beside the state, say: its parts are opened one by one.
            found += [part for name in ("bin", "lib", "lib64", "include") if Path(part := f"{path}/{name}").exists()]
        else:
            found.append(path)
    return [path for path in found if not holds(path, hidden)]


def _rank_environment(hidden: str) -> list[str]:
    """What a rank looks into beside Python's own folders: commands, and libraries that it loads by name."""
    named = [*_RANK_SYSTEM, *(f"/etc/{name}" for name in _RANK_ETC), os.path.expanduser("~/.nccl.conf")]  # noqa: PTH111
    for variable in ("PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH"):
        named += [path for path in os.environ.get(variable, "").split(os.pathsep) if os.path.isabs(path)]  # noqa: PTH117
    # Packages installed as links to their source.
    finders = [module for name, module in sys.modules.items() if name.startswith("__editable__")]
    named += [str(path) for finder in finders for path in getattr(finder, "MAPPING", {}).values()]
    named += [path for folder in sys.path for path in _linked_packages(folder)]
    named += [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH", "ROCM_PATH", "CUDA_MPS_PIPE_DIRECTORY")]
    return [path for path in dict.fromkeys(named) if path and Path(path) != Path("/") and not holds(path, hidden)]


def _linked_packages(folder: str) -> list[str]:
    """Where packages of a folder really are that an installer has linked from its cache, as a whole or file by file."""
    return [place for entry in _entries(folder) if (place := _linked_place(entry))]


def _linked_place(entry: os.DirEntry[str]) -> str:
    """The real folder of one package; empty if it is not a link, or leads nowhere."""
    with suppress(OSError):
        if entry.is_symlink():
            # Nothing but packages: a user's own folder may have links to anywhere.
            if entry.is_file() or Path(entry.path, "__init__.py").is_file():
                return os.path.realpath(entry.path)
        elif entry.is_dir():
            first = next((file for file in _entries(entry.path) if not file.is_dir()), None)
            if first is not None and first.is_symlink():
                return os.path.dirname(os.path.realpath(first.path))  # noqa: PTH120
    return ""


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing if it cannot be read."""
    with suppress(OSError), os.scandir(folder) as found:
        return list(found)
    return []


def holds(folder: str, hidden: str) -> bool:
    """Whether a folder is, or contains, the hidden one (empty: there is none), whatever links lead there."""
    real = os.path.realpath(folder)
    return bool(hidden) and Path(os.path.realpath(hidden)).is_relative_to(real)


def _new_ruleset(fields: tuple[int, ...]) -> int:
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    return _checked(_syscall(_CREATE_RULESET, attributes, len(attributes), 0), "landlock_create_ruleset")


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    """Allows what is there; what is not needs no rule."""
    with suppress(FileNotFoundError, PermissionError):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                rights &= _OF_A_FILE
            rule = struct.pack("=Qi", rights, descriptor)
            _checked(_syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0), "landlock_add_rule")
        finally:
            os.close(descriptor)


def _allow_port(ruleset: int, port: int) -> None:
    rule = struct.pack("=QQ", _CONNECT_TCP, port)
    _checked(_syscall(_ADD_RULE, ruleset, _NET_PORT, rule, 0), "landlock_add_rule")


def _restrict(ruleset: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _checked(_syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    # An integer would go as a C int: the upper half of its register is then not defined.
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return int(libc.syscall(ctypes.c_long(number), *words))


def _checked(result: int, name: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def _sizes() -> dict[str, int]:
    """VmSize, VmData and the like of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith("Vm"))
    return {name.rstrip(":"): int(number) * 1024 for name, number, _unit in fields}
