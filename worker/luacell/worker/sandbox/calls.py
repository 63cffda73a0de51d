"""Which system calls a worker may make: the tables of the levels.

Data, from which `bpf` makes filters: what is refused at level `default`, and what is allowed at `hardened` and
`untrusted`. x86-64 numbers; whoever adds another architecture adds a table.

Source: syscalls(2), and for the numbers asm/unistd_64.h, against which a test holds them.
"""

from __future__ import annotations

import fcntl
import mmap
from collections.abc import Mapping
from typing import Final

from luacell.worker.sandbox.bpf import ALLOW, OWN_PID, PRETENDED, REFUSED, UNKNOWN, Condition, Rule, Template

_AF_INET: Final = 2
_AF_INET6: Final = 10
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_GET_NAME: Final = 16
_PR_SET_PTRACER: Final = 0x59616D61
_F_SETOWN_EX: Final = 15
_F_GET_SEALS: Final = 1034
_FIOSETOWN: Final = 0x8901
_SIOCSPGRP: Final = 0x8902
_TIOCSTI: Final = 0x5412
_TIOCLINUX: Final = 0x541C

# By what a contract would gain. Each is refused whatever its arguments are.
DENIED: Final[Mapping[str, Mapping[str, int]]] = {
    # A forked child would answer a second time, and write into slots that are another call's by then. A thread is a
    # process to the kernel's count of them, which all workers of a user share: enough of them, and none can be started.
    "another process or thread": {"fork": 57, "vfork": 58, "clone": 56, "execve": 59, "execveat": 322},
    "another process's memory and descriptors": {
        "ptrace": 101,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "pidfd_getfd": 438,
        "process_madvise": 440,
    },
    # tkill names a thread without its process, so that no argument tells an own thread from a stranger's.
    "signals to others": {"tkill": 200, "pidfd_send_signal": 424},
    # The worker host may signal a whole group; none of its workers slips out of it.
    "leaving the process group": {"setpgid": 109, "setsid": 112},
    "other namespaces and roots": {"pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308},
    "mounts": {
        "mount": 165,
        "umount2": 166,
        "open_tree": 428,
        "move_mount": 429,
        "fsopen": 430,
        "fsconfig": 431,
        "fsmount": 432,
        "fspick": 433,
        "mount_setattr": 442,
        "open_tree_attr": 467,
    },
    "the machine": {
        "swapon": 167,
        "swapoff": 168,
        "reboot": 169,
        "init_module": 175,
        "delete_module": 176,
        "kexec_load": 246,
        "finit_module": 313,
        "kexec_file_load": 320,
        "acct": 163,
        "syslog": 103,
        "quotactl": 179,
        "quotactl_fd": 443,
        "settimeofday": 164,
        "clock_settime": 227,
        "adjtimex": 159,
        "clock_adjtime": 305,
    },
    # Files in memory are no data to RLIMIT_DATA, and with `write` RLIMIT_FSIZE does not bound them.
    "memory that no limit counts": {"memfd_create": 319, "memfd_secret": 447},
    # Rarely needed, often the way in. io_uring also performs calls that no filter gets to see.
    "a larger kernel surface": {
        "personality": 135,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "perf_event_open": 298,
        "bpf": 321,
        "userfaultfd": 323,
        "io_uring_setup": 425,
        "io_uring_enter": 426,
        "io_uring_register": 427,
    },
    # What landlock does not look at: it knows opening, making and removing, not looking, owners, modes and times.
    "files by the back door": {
        "chdir": 80,
        "fchdir": 81,
        "chmod": 90,
        "fchmod": 91,
        "chown": 92,
        "fchown": 93,
        "lchown": 94,
        "utime": 132,
        "setxattr": 188,
        "lsetxattr": 189,
        "fsetxattr": 190,
        "removexattr": 197,
        "lremovexattr": 198,
        "fremovexattr": 199,
        "utimes": 235,
        "inotify_init": 253,
        "fchownat": 260,
        "futimesat": 261,
        "fchmodat": 268,
        "utimensat": 280,
        "inotify_init1": 294,
        "fanotify_init": 300,
        "name_to_handle_at": 303,
        "open_by_handle_at": 304,
        "fchmodat2": 452,
        "setxattrat": 463,
        "removexattrat": 466,
        "file_setattr": 469,
    },
    # What would outlive the worker, or go on to others: objects of System V and POSIX that have names. Landlock does
    # not look at them, and those of other processes of the same user are found by counting, without any *get.
    "what stays behind, and what others left": {
        "shmget": 29,
        "shmat": 30,
        "shmctl": 31,
        "semget": 64,
        "semop": 65,
        "semctl": 66,
        "msgget": 68,
        "msgsnd": 69,
        "msgrcv": 70,
        "msgctl": 71,
        "semtimedop": 220,
        "mq_open": 240,
        "mq_unlink": 241,
    },
    "the pace of other processes": {
        "setpriority": 141,
        "sync": 162,
        "migrate_pages": 256,
        "ioprio_set": 251,
        "move_pages": 279,
        "syncfs": 306,
        "sched_setattr": 314,
    },
}

# What is connected stays connected; a worker that is confined needs none of these.
CONNECTIONS: Final[Mapping[str, int]] = {
    "socket": 41,
    "connect": 42,
    "accept": 43,
    "bind": 49,
    "listen": 50,
    "socketpair": 53,
    "accept4": 288,
}

# At `hardened`, each of these is allowed whatever its arguments are.
ALLOWED: Final[Mapping[str, Mapping[str, int]]] = {
    "its memory": {"brk": 12, "mprotect": 10, "munmap": 11, "mremap": 25, "madvise": 28},
    "what is open already": {
        "read": 0,
        "write": 1,
        "close": 3,
        "fstat": 5,
        "lseek": 8,
        "pread64": 17,
        "pwrite64": 18,
        "readv": 19,
        "writev": 20,
        "fsync": 74,
        "fdatasync": 75,
        "ftruncate": 77,
    },
    "what is connected already": {
        "sendto": 44,
        "recvfrom": 45,
        "sendmsg": 46,
        "recvmsg": 47,
        "shutdown": 48,
        "getsockname": 51,
        "getpeername": 52,
        "getsockopt": 55,
        "setsockopt": 54,
    },
    "waiting": {
        "poll": 7,
        "ppoll": 271,
        "select": 23,
        "pselect6": 270,
        "epoll_ctl": 233,
        "epoll_wait": 232,
        "epoll_pwait": 281,
        "pause": 34,
        "nanosleep": 35,
        "clock_nanosleep": 230,
        "restart_syscall": 219,
        "sched_yield": 24,
        "futex": 202,
        "futex_waitv": 449,
    },
    "time": {
        "gettimeofday": 96,
        "time": 201,
        "clock_gettime": 228,
        "clock_getres": 229,
        "times": 100,
        "getitimer": 36,
        "setitimer": 38,
        "alarm": 37,
    },
    "signals to itself": {
        "rt_sigaction": 13,
        "rt_sigprocmask": 14,
        "rt_sigreturn": 15,
        "rt_sigpending": 127,
        "rt_sigtimedwait": 128,
        "rt_sigsuspend": 130,
        "sigaltstack": 131,
    },
    "who it is": {
        "getpid": 39,
        "getppid": 110,
        "gettid": 186,
        "getuid": 102,
        "geteuid": 107,
        "getgid": 104,
        "getegid": 108,
        "getrlimit": 97,
        "getrusage": 98,
        "uname": 63,
        "sysinfo": 99,
        "sched_getaffinity": 204,
        "sched_getparam": 143,
        "sched_getscheduler": 145,
        "sched_get_priority_max": 146,
        "sched_get_priority_min": 147,
        "getcpu": 309,
    },
    "its threads and its end": {"exit": 60, "exit_group": 231, "set_robust_list": 273, "rseq": 334, "membarrier": 324},
    "random bytes": {"getrandom": 318},
}

# A descriptor's owner gets any chosen signal when data arrives (F_SETOWN, then F_SETSIG), and a terminal
# passes on what was "typed" into it, to a shell too.
_NEW_OWNER: Final = Condition(1, (fcntl.F_SETOWN, _F_SETOWN_EX))
_NEW_OWNER_OR_TYPING: Final = Condition(1, (_FIOSETOWN, _SIOCSPGRP, _TIOCSTI, _TIOCLINUX))
_TO_ITSELF: Final = Condition(0, (OWN_PID,))
_OF_ITSELF: Final = Condition(0, (0, OWN_PID))  # 0 means the caller
_INTERNET: Final = Condition(0, (_AF_INET, _AF_INET6))
# A worker that took back die_with_parent would outlive it; one that is dumpable, others could look into.
_TAKING_BACK: Final = Condition(0, (_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_PTRACER))
_FLAGS: Final = Condition(1, (fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL, _F_GET_SEALS))
# Memory that is shared with nobody, or grows like a stack, is no data to RLIMIT_DATA, which would not bound it.
_SHARED: Final = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
_MAP_GROWSDOWN: Final = 0x100
_GROWING: Final = tuple(_MAP_GROWSDOWN | kind for kind in (0, mmap.MAP_SHARED, mmap.MAP_ANONYMOUS, _SHARED))
_UNCOUNTED: Final = Condition(3, (_SHARED, *_GROWING), mask=_SHARED | _MAP_GROWSDOWN)
_NAMING: Final = Condition(0, (_PR_SET_NAME, _PR_GET_NAME))

# At every level alike.
_COMMON: Final = (
    # Its flags lie in memory, where no filter can look. Told that there is no such call, glibc uses clone.
    Rule("clone3", 435, UNKNOWN),
    # abort() and raise() send their signal by tgkill, to the process itself.
    Rule("tgkill", 234, condition=_TO_ITSELF),
    Rule("kill", 62, condition=_TO_ITSELF),
    Rule("rt_sigqueueinfo", 129, condition=_TO_ITSELF),
    Rule("rt_tgsigqueueinfo", 297, condition=_TO_ITSELF),
    # A process past its limit of CPU time gets SIGKILL, whoever set the limit.
    Rule("prlimit64", 302, condition=_OF_ITSELF),
    Rule("mmap", 9, ALLOW, condition=_UNCOUNTED, met=REFUSED),
    # Libraries set their threads' scheduling as they begin, and some (libzmq) abort where that fails.
    Rule("sched_setparam", 142, PRETENDED),
    Rule("sched_setscheduler", 144, PRETENDED),
)

_REFUSALS: Final = (
    *_COMMON,
    Rule("sched_setaffinity", 203, condition=_OF_ITSELF),
    Rule("prctl", 157, ALLOW, condition=_TAKING_BACK, met=REFUSED),
    Rule("fcntl", 72, ALLOW, condition=_NEW_OWNER, met=REFUSED),
    Rule("ioctl", 16, ALLOW, condition=_NEW_OWNER_OR_TYPING, met=REFUSED),
    *(Rule(name, number) for group in DENIED.values() for name, number in group.items()),
)

# The `default` level; what is not named here is allowed.
DENY_LIST: Final = (*_REFUSALS, *(Rule(name, number) for name, number in CONNECTIONS.items()))
# The same with `network = true`. Unix sockets stay closed: the broker's are among them.
NETWORK_DENY_LIST: Final = (
    *_REFUSALS,
    Rule("socket", CONNECTIONS["socket"], condition=_INTERNET),
    Rule("socketpair", CONNECTIONS["socketpair"]),
)
# The levels `hardened` and `untrusted`; what is not named here is refused.
ALLOW_LIST: Final = (
    *_COMMON,
    Rule("fcntl", 72, condition=_FLAGS),
    Rule("prctl", 157, condition=_NAMING),
    *(Rule(name, number, ALLOW) for group in ALLOWED.values() for name, number in group.items()),
)

DEFAULT_FILTER: Final = Template(DENY_LIST, otherwise=ALLOW)
NETWORK_FILTER: Final = Template(NETWORK_DENY_LIST, otherwise=ALLOW)
HARDENED_FILTER: Final = Template(ALLOW_LIST, otherwise=REFUSED)
