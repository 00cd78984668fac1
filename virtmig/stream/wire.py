"""Every number on QEMU's migration wire, with QEMU's own name and the file it comes from. All integers big-endian."""

from __future__ import annotations

import enum

# -- main stream (migration/qemu-file.h, migration/savevm.h) ---------------------------------------------------------
QEMU_VM_FILE_MAGIC = 0x5145564D  # "QEVM"
QEMU_VM_FILE_VERSION_COMPAT = 0x00000002  # obsolete, refused
QEMU_VM_FILE_VERSION = 0x00000003


class Item(enum.IntEnum):
    """Top-level item types (migration/savevm.h)."""

    EOF = 0x00
    SECTION_START = 0x01
    SECTION_PART = 0x02
    SECTION_END = 0x03
    SECTION_FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    SECTION_FOOTER = 0x7E


class Command(enum.IntEnum):
    """enum qemu_vm_cmd (migration/savevm.c)."""

    INVALID = 0
    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8  # up to 10.1
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11  # since 10.0


#: payload length of the commands that have one fixed length (mig_cmd_args in migration/savevm.c)
COMMAND_LENGTH: dict[Command, int] = {
    Command.OPEN_RETURN_PATH: 0,
    Command.PING: 4,
    Command.POSTCOPY_LISTEN: 0,
    Command.POSTCOPY_RUN: 0,
    Command.PACKAGED: 4,
    Command.ENABLE_COLO: 0,
    Command.POSTCOPY_RESUME: 0,
    Command.SWITCHOVER_START: 0,
}

# -- RAM section (migration/ram.c, migration/ram.h) ------------------------------------------------------------------
RAM_IDSTR = "ram"
RAM_VERSION = 4
TARGET_PAGE_BYTES = 4096  # x86; the flags below live in the low bits of a page-aligned word


class RamFlag(enum.IntFlag):
    """RAM_SAVE_FLAG_* (migration/ram.h)."""

    FULL = 0x01  # obsolete since 2009
    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20
    XBZRLE = 0x40
    HOOK = 0x80  # RDMA
    COMPRESS_PAGE = 0x100  # up to 9.0
    MULTIFD_FLUSH = 0x200  # since 8.1


ENCODING_FLAG_XBZRLE = 0x1
POSTCOPY_RAM_DISCARD_VERSION = 0
MAX_DISCARDS_PER_COMMAND = 12

# mapped-ram (migration/ram.c, since 9.0)
MAPPED_RAM_HDR_VERSION = 1
MAPPED_RAM_HEADER_BYTES = 28
MAPPED_RAM_FILE_OFFSET_ALIGNMENT = 0x100000

# -- multifd (migration/multifd.h) -----------------------------------------------------------------------------------
MULTIFD_MAGIC = 0x11223344
MULTIFD_VERSION = 1
MULTIFD_INIT_BYTES = 64
MULTIFD_PACKET_SIZE = 512 * 1024
MULTIFD_PAGES_PER_PACKET = MULTIFD_PACKET_SIZE // TARGET_PAGE_BYTES
MULTIFD_HEADER_BYTES = 320
MULTIFD_DEVICE_STATE_BYTES = 276


class MultifdFlag(enum.IntFlag):
    """MULTIFD_FLAG_* (migration/multifd.h); the compression method is one value in bits 1 to 5."""

    SYNC = 1 << 0
    NOCOMP = 0
    ZLIB = 1 << 1
    ZSTD = 2 << 1
    QPL = 4 << 1  # since 9.1
    UADK = 8 << 1  # since 9.1
    QATZIP = 16 << 1  # since 9.2
    DEVICE_STATE = 1 << 6  # since 10.0


MULTIFD_COMPRESSION_MASK = 0x1F << 1

# -- return path (migration/migration.h, enum mig_rp_message_type) ---------------------------------------------------


class ReturnPath(enum.IntEnum):
    INVALID = 0
    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7  # since 8.1


RETURN_PATH_LONGEST = 512
MIGRATION_RESUME_ACK_VALUE = 1
RAMBLOCK_RECV_BITMAP_ENDING = 0x0123456789ABCDEF
PING_PACKAGE_LOADED = 0x42  # since 10.2: its PONG lets the source leave postcopy-device

# -- channels --------------------------------------------------------------------------------------------------------
#: the magic that the upstream proposal (2024) puts on the postcopy preempt channel; no released QEMU knows it
POSTCOPY_MAGIC = 0x55667788
MULTIFD_UUID_AT = 8
MULTIFD_CHANNEL_ID_AT = 24
#: the longest compressed body a receiver takes: twice a packet (multifd_zlib_recv, multifd_zstd_recv since 9.x)
MULTIFD_COMPRESSED_LONGEST = 2 * MULTIFD_PACKET_SIZE


class Dialect(enum.StrEnum):
    """The three QEMUs whose behaviour on the wire is told apart; each stands for the releases up to the next."""

    QEMU_7_2 = "7.2"
    QEMU_10_0 = "10.0"
    QEMU_11_1 = "11.1"
