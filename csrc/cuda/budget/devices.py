"""The architectures, and how many blocks of a kernel a multiprocessor holds (the CUDA programming guide's table of
technical specifications by compute capability)."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
# The same on all of these architectures.
REGISTERS = 65536  # of a multiprocessor, in four equal parts
REGISTERS_AT_ONCE = 256  # what a warp's are rounded up to
SHARED_AT_ONCE = 128
SHARED_OF_EACH_BLOCK = 1024  # that the system takes


@dataclass(frozen=True)
class Device:
    architecture: str
    name: str  # of one that has it, whose multiprocessors are counted
    multiprocessors: int
    warps: int  # of a multiprocessor at once, as all that follows
    blocks: int
    shared: int

    @property
    def shared_of_block(self) -> int:
        return self.shared - SHARED_OF_EACH_BLOCK

    def blocks_at_once(self, threads: int, registers: int, shared: int) -> int:
        """Of a kernel on one multiprocessor; shared: static and dynamic bytes of a block."""
        warps = -(-threads // WARP)
        of_warp = -(-registers * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        by_registers = REGISTERS // 4 // of_warp * 4 // warps
        of_block = -(-(shared + SHARED_OF_EACH_BLOCK) // SHARED_AT_ONCE) * SHARED_AT_ONCE
        return min(self.blocks, self.warps // warps, by_registers, self.shared // of_block)


DEVICES = {
    device.architecture: device
    for device in (
        Device("80", "A100", multiprocessors=108, warps=64, blocks=32, shared=164 << 10),
        Device("86", "RTX 3090", multiprocessors=82, warps=48, blocks=16, shared=100 << 10),
        Device("89", "RTX 4090", multiprocessors=128, warps=48, blocks=24, shared=100 << 10),
        Device("90", "H100", multiprocessors=132, warps=64, blocks=32, shared=228 << 10),
        Device("100", "B200", multiprocessors=148, warps=64, blocks=32, shared=228 << 10),
        Device("120", "RTX 5090", multiprocessors=170, warps=48, blocks=24, shared=100 << 10),
    )
}
