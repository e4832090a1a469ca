"""What a compiled kernel takes of a multiprocessor, read from its machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property

import triton

TENSOR_CORE = ("HGMMA", "UTCHMMA", "HMMA")  # sm_90, sm_100, sm_80
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
JUMP = re.compile(r"\bBRA\b.* 0x([0-9a-f]+)$")
PENDING = re.compile(r"DEPBAR\.LE SB0, 0x([0-9a-f]+)")


@dataclass
class Resources:
    cubin: bytes
    num_warps: int
    shared: int  # bytes a block, dynamic

    def _dump(self, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @cached_property
    def _usage(self) -> dict[str, int]:
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", self._dump("-res-usage"))}

    @cached_property
    def _sass(self) -> str:
        return self._dump("-sass")

    @property
    def registers(self) -> int:
        return self._usage["REG"]

    @property
    def spills(self) -> int:
        """Bytes a thread keeps in local memory."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    @cached_property
    def instruction(self) -> str:
        """The tensor-core instruction of the machine code, or "" when there is none."""
        return next((name for name in TENSOR_CORE if name in self._sass), "")

    @cached_property
    def _boxes_ahead(self) -> int:
        """Copies of boxes that are started before the first product."""
        before = re.split("|".join(TENSOR_CORE), self._sass)[0]
        return before.count("UTMALDG")

    @cached_property
    def products(self) -> list[list[str]]:
        """The instructions of each innermost loop that uses tensor cores."""
        code = [(int(address, 16), text) for address, text in INSTRUCTION.findall(self._sass)]
        jumps = [(int(found[1], 16), address) for address, text in code if (found := JUMP.search(text))]
        back = [(first, last) for first, last in jumps if first < last]
        # A wait is tried again behind the kernel's end, which then jumps back into the loop it came from.
        back = [(a, b) for a, b in back if not any(first < a <= last < b for first, last in back)]
        loops = [[text for address, text in code if first <= address <= last] for first, last in back]
        loops = [loop for loop in loops if any(name in text for text in loop for name in TENSOR_CORE)]
        return [a for a in loops if not any(set(b) < set(a) and len(b) < len(a) for b in loops)]

    def faults_of_pipelining(self) -> list[str]:
        """Why tensor cores would wait: for loads, for all copies in flight, for one another."""
        faults = [] if self.products else ["no loop of products"]
        for loop in self.products:
            text = "\n".join(loop)
            batches, steps = text.count("WARPGROUP.ARRIVE"), text.count("HGMMA")
            if steps and batches != 1:
                faults.append(f"{batches} batches of {steps} wgmma an iteration")
            if "LDGSTS" not in text and "UTMALDG" not in text:
                faults.append("loads that are not asynchronous")
            if "0" in PENDING.findall(text):
                faults.append("waits for all of its copies")
            if self._boxes_ahead < 2 * text.count("UTMALDG"):
                faults.append("has fewer than two iterations' boxes on their way")
        return faults

    def blocks_per_multiprocessor(self, shared_limit: int) -> int:
        """Resident blocks, by registers (65 536, allocated by 8 a thread), shared memory and 64 warps."""
        by_registers = 65_536 // (-(-self.registers // 8) * 8 * 32 * self.num_warps)
        by_shared = shared_limit // max(self.shared + 1024, 1)
        return min(by_registers, by_shared, 64 // self.num_warps, 32)


def of(compiled) -> Resources:
    """Of what `Launch.compile` returns."""
    return Resources(compiled.asm["cubin"], compiled.metadata.num_warps, compiled.metadata.shared)
