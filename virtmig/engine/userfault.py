"""userfaultfd without a library: opening, registering, placing pages, reading faults. x86-64 and aarch64.

Addresses are those of the process that opened the descriptor, also when another one uses it (SCM_RIGHTS); only the
source of `copy` lies in the caller. Every ioctl releases the interpreter lock. Numbers and structures:
include/uapi/linux/userfaultfd.h (Linux 6.18); the ioctl numbers are those of _IOC on both machines.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from virtmig.errors import GuestMemoryError

#: __NR_userfaultfd
SYSCALL_NUMBERS = {"x86_64": 323, "aarch64": 282}
DEVICE = "/dev/userfaultfd"
USERFAULTFD_IOC_NEW = 0xAA00  # _IO(0xAA, 0x00), Linux 6.1

UFFD_API = 0xAA
UFFD_USER_MODE_ONLY = 1  # Linux 5.11: faults of the kernel (read into guest memory) end with EFAULT

UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_EVENT_FORK = 1 << 1
UFFD_FEATURE_EVENT_REMAP = 1 << 2
UFFD_FEATURE_EVENT_REMOVE = 1 << 3
UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFD_FEATURE_EVENT_UNMAP = 1 << 6
UFFD_FEATURE_SIGBUS = 1 << 7
UFFD_FEATURE_THREAD_ID = 1 << 8
UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9
UFFD_FEATURE_MINOR_SHMEM = 1 << 10  # 5.14
UFFD_FEATURE_EXACT_ADDRESS = 1 << 11
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12  # 5.19
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13  # 6.4
UFFD_FEATURE_POISON = 1 << 14
UFFD_FEATURE_WP_ASYNC = 1 << 15  # 6.7
UFFD_FEATURE_MOVE = 1 << 16
FEATURE_NAMES = {value: name for name, value in list(globals().items()) if name.startswith("UFFD_FEATURE_")}

UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_REGISTER_MODE_MINOR = 1 << 2

UFFDIO_API = 0xC018AA3F  # _IOWR(UFFDIO, 0x3F, struct uffdio_api)
UFFDIO_REGISTER = 0xC020AA00  # _IOWR(UFFDIO, 0x00, struct uffdio_register)
UFFDIO_UNREGISTER = 0x8010AA01  # _IOR(UFFDIO, 0x01, struct uffdio_range)
UFFDIO_WAKE = 0x8010AA02  # _IOR(UFFDIO, 0x02, struct uffdio_range)
UFFDIO_COPY = 0xC028AA03  # _IOWR(UFFDIO, 0x03, struct uffdio_copy)
UFFDIO_ZEROPAGE = 0xC020AA04  # _IOWR(UFFDIO, 0x04, struct uffdio_zeropage)
UFFDIO_WRITEPROTECT = 0xC018AA06  # _IOWR(UFFDIO, 0x06, struct uffdio_writeprotect)
UFFDIO_CONTINUE = 0xC020AA07  # _IOWR(UFFDIO, 0x07, struct uffdio_continue)

UFFDIO_COPY_MODE_DONTWAKE = 1 << 0
UFFDIO_COPY_MODE_WP = 1 << 1
UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1
UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0

UFFD_EVENT_PAGEFAULT = 0x12
UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFD_PAGEFAULT_FLAG_WP = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2

_API = struct.Struct("=QQQ")  # api, features, ioctls
_REGISTER = struct.Struct("=QQQQ")  # start, len, mode, ioctls
_RANGE = struct.Struct("=QQ")  # start, len
_RANGE_MODE = struct.Struct("=QQQ")  # start, len, mode
_RANGE_MODE_DONE = struct.Struct("=QQQq")  # start, len, mode, zeropage or mapped
_COPY = struct.Struct("=QQQQq")  # dst, src, len, mode, copy
_MESSAGE = struct.Struct("=B7xQQI4x")  # struct uffd_msg: event, then arg.pagefault: flags, address, ptid
#: one read takes at most this many faults
FAULTS_PER_READ = 64
#: UFFDIO_* answers EAGAIN without progress only while the process changes its mappings (mmap_changing)
_IDLE_TRIES = 10_000


class PageExists(GuestMemoryError):
    """A page in the range is mapped already (EEXIST); `done_bytes` in front of it were placed."""

    def __init__(self, message: str, done_bytes: int) -> None:
        super().__init__(message)
        self.done_bytes = done_bytes


class GuestGone(GuestMemoryError):
    """The process whose memory this is has ended (ESRCH)."""


class Fault(NamedTuple):
    """One UFFD_EVENT_PAGEFAULT. `address` is masked to the page unless EXACT_ADDRESS was asked for."""

    address: int
    flags: int
    thread: int  # 0 unless UFFD_FEATURE_THREAD_ID was asked for


class UserfaultFacts(msgspec.Struct, frozen=True):
    """What this process can do with userfaultfd on this host. `reason` says why not, or by which way it is opened."""

    available: bool
    reason: str
    hint: str = ""
    features: int = 0
    user_mode_only: bool = False

    def has(self, features: int) -> bool:
        return self.available and self.features & features == features

    @property
    def feature_names(self) -> tuple[str, ...]:
        return feature_names(self.features)


def feature_names(features: int) -> tuple[str, ...]:
    """The kernel's names; a bit that has none yet as its number."""
    return tuple(FEATURE_NAMES.get(1 << bit, f"bit {bit}") for bit in range(64) if features >> bit & 1)


class Userfault:
    """One userfaultfd, after its handshake. The descriptor is non-blocking and is owned by this object."""

    def __init__(self, fd: int, features: int = 0, *, user_mode_only: bool = False) -> None:
        self.fd = fd
        self.features = features
        self.user_mode_only = user_mode_only
        self._messages = bytearray(_MESSAGE.size * FAULTS_PER_READ)

    @classmethod
    def open(cls, features: int = 0) -> Userfault:
        """A new one for this process's memory, with `features` on. Raises GuestMemoryError with the way out."""
        fd, user_mode_only = _open()
        try:
            offered = _handshake(fd, features)
        except BaseException as error:
            os.close(fd)
            if not isinstance(error, OSError):
                raise
            missing = feature_names(features & ~available().features)
            wanted = ", ".join(missing) or f"UFFD_API {UFFD_API:#x}"
            raise GuestMemoryError(
                f"this kernel ({platform.release()}) lacks {wanted} of userfaultfd", hint="a newer kernel has it"
            ) from None
        return cls(fd, offered, user_mode_only=user_mode_only)

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        """The last close of a descriptor also unregisters its ranges and wakes whoever waits in them."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Userfault:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def register(self, start: int, length: int, *, missing: bool = False, minor: bool = False, wp: bool = False) -> int:
        """Returns which UFFDIO_* may be used on the range, bit n for the ioctl number n."""
        mode = (
            (UFFDIO_REGISTER_MODE_MISSING if missing else 0)
            | (UFFDIO_REGISTER_MODE_MINOR if minor else 0)
            | (UFFDIO_REGISTER_MODE_WP if wp else 0)
        )
        argument = bytearray(_REGISTER.pack(start, length, mode, 0))
        self._simple(UFFDIO_REGISTER, argument, "UFFDIO_REGISTER", start, length)
        return int(_REGISTER.unpack(argument)[3])

    def unregister(self, start: int, length: int) -> None:
        """Also wakes whoever waits in the range."""
        self._simple(UFFDIO_UNREGISTER, bytearray(_RANGE.pack(start, length)), "UFFDIO_UNREGISTER", start, length)

    def wake(self, start: int, length: int) -> None:
        self._simple(UFFDIO_WAKE, bytearray(_RANGE.pack(start, length)), "UFFDIO_WAKE", start, length)

    def copy(self, start: int, source: int, length: int, mode: int = 0) -> None:
        """Place `length` bytes of this process's memory at `source`. Raises PageExists, GuestGone."""

        def pack(done: int) -> bytearray:
            return bytearray(_COPY.pack(start + done, source + done, length - done, mode, 0))

        self._in_parts(UFFDIO_COPY, pack, "UFFDIO_COPY", start, length)

    def zeropage(self, start: int, length: int, mode: int = 0) -> None:
        """Place zero pages; on shmem they are allocated. Raises PageExists, GuestGone."""
        self._ranged(UFFDIO_ZEROPAGE, "UFFDIO_ZEROPAGE", start, length, mode)

    def continue_(self, start: int, length: int, mode: int = 0) -> None:
        """Map what the file behind the range holds already (EFAULT for a hole). Raises PageExists, GuestGone."""
        self._ranged(UFFDIO_CONTINUE, "UFFDIO_CONTINUE", start, length, mode)

    def writeprotect(self, start: int, length: int, *, protect: bool, wake: bool = True) -> None:
        mode = UFFDIO_WRITEPROTECT_MODE_WP if protect else 0
        mode |= 0 if wake or protect else UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        argument = _RANGE_MODE.pack(start, length, mode)
        for _ in range(_IDLE_TRIES):
            try:
                fcntl.ioctl(self.fd, UFFDIO_WRITEPROTECT, bytearray(argument))
            except BlockingIOError:
                os.sched_yield()
                continue
            except OSError as error:
                raise _refused("UFFDIO_WRITEPROTECT", error, start, length, 0) from None
            return
        raise _stuck("UFFDIO_WRITEPROTECT", start, length, 0)

    def faults(self) -> list[Fault]:
        """Every page fault that waits to be read, at most FAULTS_PER_READ; none at all is an empty list.

        Other events come only with features that nothing here asks for, and are dropped.
        """
        try:
            size = os.readv(self.fd, [self._messages])
        except BlockingIOError:
            return []
        except OSError as error:
            raise GuestMemoryError(f"cannot read the userfaultfd: {error.strerror}") from None
        found = _MESSAGE.iter_unpack(memoryview(self._messages)[:size])
        return [Fault(address, flags, tid) for event, flags, address, tid in found if event == UFFD_EVENT_PAGEFAULT]

    def _simple(self, request: int, argument: bytearray, name: str, start: int, length: int) -> None:
        try:
            fcntl.ioctl(self.fd, request, argument)
        except OSError as error:
            raise _refused(name, error, start, length, 0) from None

    def _ranged(self, request: int, name: str, start: int, length: int, mode: int) -> None:
        def pack(done: int) -> bytearray:
            return bytearray(_RANGE_MODE_DONE.pack(start + done, length - done, mode, 0))

        self._in_parts(request, pack, name, start, length)

    def _in_parts(self, request: int, pack: Callable[[int], bytearray], name: str, start: int, length: int) -> None:
        """EAGAIN with a positive last field: that many bytes were placed, and the rest remains to be asked for."""
        done = idle = 0
        while idle < _IDLE_TRIES:
            argument = pack(done)
            try:
                fcntl.ioctl(self.fd, request, argument)
                return
            except BlockingIOError:
                placed = int.from_bytes(argument[-8:], "little", signed=True)
                if placed > 0:
                    done, idle = done + placed, 0
                else:
                    idle += 1
                    os.sched_yield()
            except OSError as error:
                raise _refused(name, error, start, length, done) from None
        raise _stuck(name, start, length, done)


def available() -> UserfaultFacts:
    """Open one, ask for its features, close it."""
    try:
        fd, user_mode_only = _open()
    except GuestMemoryError as error:
        return UserfaultFacts(False, error.message, error.hint)
    try:
        features = _handshake(fd, 0)
    except OSError as error:
        return UserfaultFacts(False, f"UFFDIO_API {UFFD_API:#x} was refused: {error.strerror}")
    finally:
        os.close(fd)
    way = "faults in user mode only" if user_mode_only else "all faults"
    return UserfaultFacts(True, f"userfaultfd can be opened, for {way}", "", features, user_mode_only)


def open_userfaultfd_device() -> int:
    """By /dev/userfaultfd (Linux 6.1). Raises OSError."""
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(device)


def open_userfaultfd_syscall(flags: int) -> int:
    """By userfaultfd(2). Raises OSError."""
    number = SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of userfaultfd(2) on {platform.machine()} is not known here")
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(number, flags | os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _open() -> tuple[int, bool]:
    """The device, then the system call for user mode, then the old system call: (descriptor, user mode only)."""
    with contextlib.suppress(OSError):
        return open_userfaultfd_device(), False
    try:
        return open_userfaultfd_syscall(UFFD_USER_MODE_ONLY), True
    except OSError as error:
        if error.errno == errno.EINVAL:  # before 5.11
            try:
                return open_userfaultfd_syscall(0), False
            except OSError as older:
                error = older
        raise why_not(error) from None


def why_not(error: OSError) -> GuestMemoryError:
    """What the refusal of userfaultfd(2) means and who can lift it."""
    if error.errno == errno.ENOSYS:
        return GuestMemoryError(
            f"no userfaultfd here: {error.strerror}", hint="a kernel with CONFIG_USERFAULTFD=y, on x86-64 or aarch64"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        try:
            with open("/proc/sys/vm/unprivileged_userfaultfd", encoding="ascii") as file:
                sysctl = file.read().strip()
        except OSError:
            sysctl = "unknown"
        return GuestMemoryError(
            f"userfaultfd is not permitted (vm.unprivileged_userfaultfd is {sysctl})",
            hint=f"give this user read and write access to {DEVICE}; or 'sysctl vm.unprivileged_userfaultfd=1'; or run "
            "with CAP_SYS_PTRACE; in a container, allow userfaultfd(2) in its seccomp profile",
        )
    return GuestMemoryError(f"cannot open a userfaultfd: {error.strerror}")


def _handshake(fd: int, features: int) -> int:
    """UFFDIO_API, once for a descriptor: the features the kernel offers. Raises OSError (EINVAL: one it lacks)."""
    argument = bytearray(_API.pack(UFFD_API, features, 0))
    fcntl.ioctl(fd, UFFDIO_API, argument)
    return int(_API.unpack(argument)[1])


def _refused(name: str, error: OSError, start: int, length: int, done: int) -> GuestMemoryError:
    where = f"{name} of {length:#x} bytes at {start:#x}"
    if error.errno == errno.EEXIST:
        return PageExists(f"{where}: the page at {start + done:#x} is there already", done)
    if error.errno == errno.ESRCH:
        return GuestGone(f"{where}: the process has ended")
    return GuestMemoryError(f"{where} failed at {start + done:#x}: {error.strerror}")


def _stuck(name: str, start: int, length: int, done: int) -> GuestMemoryError:
    return GuestMemoryError(f"{name} of {length:#x} bytes at {start:#x} made no progress at {start + done:#x}")
