# The lab's guest: a boot sector that fills memory, dirties it at a set rate, and prints a heartbeat.
#
# Every byte of [1 MiB, 1 MiB + pages * 4 KiB) is defined at every moment: the first word of each page is a counter,
# every other word is its own address times 0x9E3779B1. The walk goes over the pages for ever and adds one to each
# counter, so all counters are equal except for one step of one, where the walk is. A lost, stale or torn page breaks
# that, and the filler cannot be compressed away.
#
# The timer ticks 250 times a second. Each tick earns rate/256 pages of the walk; between ticks the guest halts. Every
# 25 ticks (100 ms of guest time) it prints the tick count as eight hexadecimal digits and a newline on COM1.
#
# Build:  as --32 -o guest.o guest.S && ld -m elf_i386 -Ttext 0x7c00 --oformat binary -e start -o guest.bin guest.o
# A test builds it again and compares the bytes.

        .equ    FIRST,  0x100000
        .equ    HASH,   0x9E3779B1
        .equ    IDT,    0x6000
        .equ    COM1,   0x3f8
        .equ    PIT_DIVISOR, 4773               # 1193182 Hz / 250

        .code16
        .globl  start
start:  cli
        cld
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7c00, %sp
        inb     $0x92, %al                      # the A20 line
        orb     $2, %al
        outb    %al, $0x92
        lgdt    gdtr
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmp    $8, $flat

        .code32
flat:   movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x7000, %esp

        movl    $FIRST, %edi                    # the filler
        movl    pages, %ecx
        shll    $10, %ecx
fill:   imull   $HASH, %edi, %eax
        stosl
        loop    fill
        movl    $FIRST, %edi                    # the counters
        movl    pages, %ecx
clear:  movl    $0, (%edi)
        addl    $0x1000, %edi
        loop    clear

        movl    $IDT, %edi                      # one gate: vector 0x20, the timer
        movl    $tick, %eax
        movw    %ax, 0x100(%edi)
        movw    $8, 0x102(%edi)
        movw    $0x8e00, 0x104(%edi)
        shrl    $16, %eax
        movw    %ax, 0x106(%edi)
        lidt    idtr

        movl    $picinit, %esi                  # both interrupt controllers, everything masked but the timer
        movl    $(picend - picinit) / 2, %ecx
        xorl    %edx, %edx
pic:    lodsb
        movb    %al, %dl
        lodsb
        outb    %al, %dx
        loop    pic
        sti

        xorl    %ebx, %ebx                      # ticks worked off
        xorl    %ebp, %ebp                      # earned pages, 24.8 fixed point
        movl    $FIRST, %edi
again:  movl    rate, %eax
        cmpl    $-1, %eax                       # as fast as possible
        je      walk
rest:   cli                                     # sti takes effect after hlt: no tick falls between
        cmpl    ticks, %ebx
        jne     work
        sti
        hlt
        jmp     rest
work:   sti
        incl    %ebx
        addl    rate, %ebp
        movl    %ebp, %ecx
        andl    $0xff, %ebp
        shrl    $8, %ecx
        jz      again
        jmp     step
walk:   movl    $256, %ecx
step:   incl    (%edi)
        addl    $0x1000, %edi
        cmpl    limit, %edi
        jb      next
        movl    $FIRST, %edi
next:   loop    step
        jmp     again

tick:   pushal
        incl    ticks
        decl    beat
        jnz     quiet
        movl    $25, beat
        movl    ticks, %ebx
        movl    $8, %ecx
        movw    $COM1, %dx
digit:  roll    $4, %ebx
        movb    %bl, %al
        andb    $15, %al
        cmpb    $10, %al
        sbbb    $0x69, %al                      # 0..15 -> '0'..'9', 'A'..'F'
        das
        outb    %al, %dx
        loop    digit
        movb    $10, %al
        outb    %al, %dx
quiet:  movb    $0x20, %al                      # end of interrupt
        outb    %al, $0x20
        popal
        iret

ticks:  .long   0
beat:   .long   25

picinit:                                        # pairs of port and byte
        .byte   0x20, 0x11, 0x21, 0x20, 0x21, 0x04, 0x21, 0x01, 0x21, 0xfe
        .byte   0xa0, 0x11, 0xa1, 0x28, 0xa1, 0x02, 0xa1, 0x01, 0xa1, 0xff
        .byte   0x43, 0x34, 0x40, PIT_DIVISOR & 0xff, 0x40, PIT_DIVISOR >> 8
picend:

        .balign 8
gdt:    .quad   0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr:   .word   23
        .long   gdt
idtr:   .word   0x107
        .long   IDT

# Settings, patched by guest.py at these offsets of the sector
        .org    0x1f0
pages:  .long   1024                            # 0x1f0: pages in the walk
limit:  .long   FIRST + 1024 * 4096             # 0x1f4: address behind the last of them
rate:   .long   256                             # 0x1f8: pages per tick, times 256; 0xffffffff: as fast as possible
        .org    510
        .word   0xaa55
