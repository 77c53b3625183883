"""What code in a sandbox may ask of Linux: a list of system calls as a filter that the kernel runs (seccomp).

Whatever is not listed is refused: new processes, programs, sockets, signals to others, shared memory, tracing, mounts,
clocks, and changes of owner, mode or times of files, which Landlock does not watch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

_EVERYWHERE = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, close 3 57, close_range 436 436,
lseek 8 62, fstat 5 80, newfstatat 262 79, statx 332 291, faccessat 269 48, faccessat2 439 439, openat 257 56,
getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, readlinkat 267 78, mkdirat 258 34, unlinkat 263 35,
renameat 264 38, renameat2 316 276, ftruncate 77 46, fsync 74 82, fdatasync 75 83, fadvise64 221 223,
flock 73 32, umask 95 166, dup 32 23, dup3 292 24, pipe2 293 59, ppoll 271 73, pselect6 270 72, epoll_create1 291 20,
epoll_ctl 233 21, epoll_pwait 281 22, eventfd2 290 19, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226,
madvise 28 233, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132,
futex 202 98, set_robust_list 273 99, get_robust_list 274 100, rseq 334 293, membarrier 324 283,
set_tid_address 218 96, sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, nanosleep 35 101,
clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, times 100 153,
setitimer 38 103, getrusage 98 165, sysinfo 99 179, getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174,
geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getpgid 121 155, getsid 124 156, uname 63 160,
getrandom 318 278, exit 60 93, exit_group 231 94, restart_syscall 219 128
"""
"""Name, number on x86_64, number on aarch64."""
_X86_ONLY = """
stat 4, lstat 6, access 21, open 2, creat 85, getdents 78, readlink 89, mkdir 83, rmdir 84, unlink 87, rename 82,
dup2 33, pipe 22, poll 7, select 23, epoll_wait 232, time 201, alarm 37, getpgrp 111, arch_prctl 158
"""

# Architecture (linux/audit.h), column of the table, and the numbers of calls that are allowed in part.
_MACHINES = {
    "x86_64": (0xC000003E, 1, {"clone": 56, "ioctl": 16, "fcntl": 72, "fallocate": 285}),
    "aarch64": (0xC00000B7, 2, {"clone": 220, "ioctl": 29, "fcntl": 25, "fallocate": 47}),
}
_CLONE_THREAD = 0x10000
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)
"""Is it a terminal, of which size; how much waits to be read; close on exec, or not."""
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
"""Duplicates, flags, locks, the size of a pipe. Not F_SETOWN: it has the kernel send signals to others."""
_FALLOCATE = (0,)
"""Room that the size of the file tells."""
_X32 = 0x40000000
_NEWEST = 450
"""Calls after this one, and clone3, are answered as by an older kernel, so that the C library takes the older call."""
_CLONE3 = 435

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NO_PERMISSION, _NO_SUCH_CALL = 1, 38


def call_filter(machine: str) -> bytes | None:
    """The filter as an array of `struct sock_filter`; None where the numbers of this machine are not known."""
    if machine not in _MACHINES:
        return None
    architecture, column, partly = _MACHINES[machine]
    allowed = [int(row.split()[column]) for row in _EVERYWHERE.split(",")]
    if machine == "x86_64":
        allowed += [int(row.split()[1]) for row in _X86_ONLY.split(",")]
    code = [
        *_unless(_EQUAL, 4, [architecture], _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _X32 if machine == "x86_64" else 0xFFFFFFFF), (_RETURN, 0, 0, _KILL),
    ]
    for number in allowed:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code += _when(partly["clone"], 16, [(_ANY_BIT, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW)])
    code += _when(partly["ioctl"], 24, _one_of(_IOCTL))
    code += _when(partly["fcntl"], 24, _one_of(_FCNTL))
    code += _when(partly["fallocate"], 24, _one_of(_FALLOCATE))
    code += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERROR | _NO_SUCH_CALL)]
    code += [(_AT_LEAST, 0, 1, _NEWEST), (_RETURN, 0, 0, _ERROR | _NO_SUCH_CALL)]
    code += [(_RETURN, 0, 0, _ERROR | _NO_PERMISSION)]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


_Line = tuple[int, int, int, int]
"""Operation, jump if true, jump if false, operand."""


def _unless(operation: int, offset: int, values: Iterable[int], otherwise: int) -> list[_Line]:
    return [(_LOAD, 0, 0, offset), *((operation, 1, 0, value) for value in values), (_RETURN, 0, 0, otherwise)]


def _one_of(values: Iterable[int]) -> list[_Line]:
    return [line for value in values for line in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]


def _when(number: int, argument: int, lines: list[_Line]) -> list[_Line]:
    """Only for one call: look at an argument (its offset in `struct seccomp_data`), else go on."""
    refused = [(_RETURN, 0, 0, _ERROR | _NO_PERMISSION)]
    inside = [(_LOAD, 0, 0, argument), *lines, *refused]
    return [(_EQUAL, 0, len(inside), number), *inside]
