"""Translates kernels from PTX, as nvcc writes it, to C++ for the emulation: ../README.md.

    translate.py KERNELS.ptx KERNELS.cpp REGEX ...

Each opcode that may occur is in FORMS, spelled out with all its modifiers, and means what instructions.h says. Whatever
else there is stops the translation: nothing is left out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The operands of opcodes: what is written = what is read. T is the type at the opcode's end, and D, T the two of a
# conversion; p is a predicate, x2 and x4 vectors in braces, `at` an address in brackets, n a number. An opcode may have
# several forms.
#
# instructions.h has `add.s32` as add<s32> and `ld.shared.v4.u32` as ld_shared<Vector<u32, 4>>.
FORMS = {
    "T = T": """
        mov.u16 mov.u32 mov.u64 mov.b32 mov.b64 mov.f32 mov.f64 mov.pred cvta.to.global.u64 not.b32 not.b64
        not.pred neg.s32 neg.s64 neg.f32 neg.f64 abs.s64 abs.f32 abs.f64 rcp.rn.f32 rcp.rn.f64
        rcp.approx.ftz.f32 rcp.approx.ftz.f64 ex2.approx.ftz.f32
    """,
    "T = T T": """
        add.s32 add.s64 add.f32 add.f64 add.rn.f64 sub.s32 sub.s64 sub.f32 sub.f64 mul.lo.s32 mul.lo.s64
        mul.f32 mul.f64 div.s32 div.s64 div.u32 div.rn.f32 div.rn.f64 rem.s32 min.s32 min.s64 max.s32
        max.s64 max.f32 max.f64 copysign.f32 copysign.f64 and.b32 and.b64 and.pred or.b32 or.b64 or.pred
        xor.b32 xor.b64
    """,
    "T = T T T": "fma.rn.f32 fma.rm.f32 fma.rn.f64 mad.lo.s32 prmt.b32",
    "T = T u32": "shl.b32 shl.b64 shr.s32 shr.u32 shr.s64 shr.u64",
    "T = T T p": "selp.b32 selp.b64 selp.f32 selp.f64 selp.u16 selp.u32",
    "T = T T u32 u32": "bfi.b32 bfi.b64",
    "u64 = T T": "mul.wide.u32",
    "s64 = T T": "mul.wide.s32",
    "p = T T": """
        setp.eq.s16 setp.eq.s32 setp.ne.s32 setp.lt.s32 setp.le.s32 setp.gt.s32 setp.ge.s32 setp.lt.u32
        setp.le.u32 setp.gt.u32 setp.eq.s64 setp.ne.s64 setp.lt.s64 setp.le.s64 setp.gt.s64 setp.ge.s64
        setp.lt.u64 setp.eq.f32 setp.lt.f32 setp.gt.f32 setp.ge.f32 setp.neu.f32 setp.geu.f32 setp.eq.f64
        setp.lt.f64 setp.gt.f64 setp.neu.f64 setp.gtu.f64 setp.ltu.f64
    """,
    "D = T": """
        cvt.u32.u16 cvt.u32.u64 cvt.u64.u32 cvt.s64.s32 cvt.rn.f32.s32 cvt.rn.f32.s64 cvt.rn.f64.u32
        cvt.rn.f64.s64 cvt.f64.f32 cvt.rn.f32.f64 cvt.sat.f32.f32 cvt.rni.f32.f32 cvt.f32.f16 cvt.rn.f16.f32
        cvt.rn.bf16.f32 cvt.rna.tf32.f32
    """,
    "D = T T": "cvt.rn.f16x2.f32 cvt.rn.bf16x2.f32",
    "T = at": """
        ld.param.u8 ld.param.u32 ld.param.u64 ld.param.f64 ld.global.u8 ld.global.u16 ld.global.u64
        ld.global.u32 ld.global.v4.u32 ld.global.f32 ld.global.v4.f32 ld.global.f64 ld.global.cg.v4.u32
        ld.acquire.gpu.u32
        ld.shared.u32 ld.shared.f32 ld.shared.f64 ld.shared.v2.f32 ld.shared.v4.u32 ld.shared.v4.f32
    """,
    "at T": """
        st.global.u16 st.global.u32 st.global.u64 st.global.f32 st.global.f64 st.global.v4.u32 st.shared.u16
        st.shared.u32 st.shared.u64 st.shared.f32 st.shared.f64 st.shared.v2.f32 st.shared.v4.u32
    """,
    "T = at T": "atom.add.release.gpu.u32",
    "T|p = T u32 u32 u32": "shfl.sync.bfly.b32",
    "b32x4 = at": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "f32x4 = b32x4 b32x2 f32x4": """
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
    """,
    "shared global n u32": "cp.async.cg.shared.global",
    "n": "cp.async.wait_group bar.sync barrier.sync",
    "": "cp.async.commit_group trap ret",
    "label": "bra bra.uni",
    # %temp stands for a half that nobody wants.
    "T = b32x2": "mov.b64",
    "b32x2 = T": "mov.b64",
    "b16x2 = T": "mov.b32",
}
SPECIAL = [
    "%envreg1",
    "%envreg2",
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
]

# Bits of a type; and of a register, which holds any type of its size.
BITS = {
    **{kind + str(bits): bits for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f32": 32, "tf32": 32, "f16x2": 32, "bf16x2": 32, "f64": 64, "pred": 1, "p": 1},
}
# Types that are a register's own in C++, too.
SAME = {"p": "pred", **{f"u{bits}": f"b{bits}" for bits in (16, 32, 64)}}
REGISTERS = {"pred", "b16", "b32", "b64", "f32", "f64"}
# Of an address in a state space; parameters are addressed as global memory is.
ADDRESSES = {"shared": "b32", "global": "b64"}


class Unsupported(Exception):
    """Says what there is that cannot be translated, and where."""


class Form(NamedTuple):
    written: list[str]
    read: list[str]
    function: str  # of instructions.h


def form_of(signature: str, opcode: str) -> Form:
    parts = opcode.split(".")
    types: list[str] = []
    while parts and parts[-1] in BITS and not opcode.startswith(("mma.", "ldmatrix.")) and len(types) < 2:
        types.insert(0, parts.pop())
    if parts and re.fullmatch("v[24]", parts[-1]):
        types[-1] += "x" + parts.pop()[1:]
    names = {"T": types[-1], "D": types[0]} if types else {}
    names["at"] = "shared" if ".shared" in opcode else "global"
    template = ", ".join(f"Vector<{t[:-2]}, {t[-1]}>" if is_vector(t) else t for t in types)
    function = "_".join(parts) + ("_" if parts[0] in ("and", "or", "xor", "not") else "")  # C++ has those words
    if opcode.startswith("mov.") and is_vector(signature.partition(" ")[0]):
        function = "mov_halves"
    elif template:
        function += f"<{template}>"
    *written, read = ([names.get(t, t) for t in re.findall(r"\w+", side)] for side in signature.split("="))
    return Form(written[0] if written else [], read, function)


def is_vector(type_: str) -> bool:
    return re.fullmatch(r"[bufs]\d+x[24]", type_) is not None and type_ not in BITS


def as_type(wanted: str, given: str, cpp: str) -> str:
    """C++ of the same bits as another type."""
    same = SAME.get(wanted, wanted) == SAME.get(given, given)
    return cpp if same else f"bits<{wanted}>({cpp})"


WHITELIST: dict[str, list[Form]] = {}
for signature, opcodes in FORMS.items():
    for opcode in opcodes.split():
        WHITELIST.setdefault(opcode, []).append(form_of(signature, opcode))


def without_hash(name: str) -> str:
    """A kernel's name as the host's compiler has it: nvcc has a name of its own for each anonymous namespace.

    >>> without_hash("_ZN7fastseq4cuda23_GLOBAL__N__00000000_a_4addEv")
    '_ZN7fastseq4cuda12_GLOBAL__N_14addEv'
    """
    found = re.search(r"(\d+)(?=_GLOBAL__N__)", name)
    return name if not found else f"{name[: found.start()]}12_GLOBAL__N_1{name[found.end() + int(found[1]) :]}"


class Kernel:
    """Of one kernel, as C++."""

    def __init__(self, file: str, name: str, number: int, shared: set[str]) -> None:
        self.file, self.name, self.number, self.shared = file, name, number, shared
        self.line = 0
        self.parameters: dict[str, int] = {}  # offsets
        self.parameter_bytes = 0
        self.max_threads = 1024
        self.scopes: list[dict[str, tuple[str, str]]] = []  # registers: C++'s name and type
        self.scope_count = 0
        self.used: dict[str, str] = {}  # of C++'s names, the types
        self.text: list[str] = []

    def error(self, what: str) -> Unsupported:
        return Unsupported(f"{self.file}:{self.line}: {self.name}: {what}")

    def add_parameter(self, declaration: str) -> None:
        found = re.fullmatch(r"\.param (?:\.align (\d+) )?\.(\w+) (\w+)(?:\[(\d+)\])?", declaration)
        if not found or found[2] not in BITS:
            raise self.error(f"a parameter of an unknown kind: {declaration}")
        size = BITS[found[2]] // 8
        align, size = int(found[1] or size), size * int(found[4] or 1)
        offset = -(-self.parameter_bytes // align) * align
        self.parameters[found[3]], self.parameter_bytes = offset, offset + size

    # ---- Operands ----------------------------------------------------------------------------------------------------
    def register(self, name: str) -> tuple[str, str] | None:
        found = next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
        if found:
            self.used[found[0]] = found[1]
        return found

    def read(self, type_: str, operand: str, opcode: str) -> str:
        if is_vector(type_):
            parts = [self.read(type_[:-2], part, opcode) for part in self.elements(type_, operand)]
            return f"Vector<{type_[:-2]}, {type_[-1]}>{{{', '.join(parts)}}}"
        if type_ in ADDRESSES:
            return self.address(ADDRESSES[type_], operand, opcode)
        if type_ == "n" and re.fullmatch(r"\d+", operand):
            return operand
        known = self.register(operand)
        if known and type_ != "n":
            cpp, own = known
            if opcode.startswith("cvt.") and type_[0] in "us" and own[0] == "b" and BITS[own] > BITS[type_]:
                return f"{type_}({cpp})"  # a conversion takes the lower bits of a wider register
            if BITS[own] != BITS[type_]:
                raise self.error(f"{opcode}: {operand} has {BITS[own]} bits, expected {BITS[type_]}")
            return as_type(type_, own, cpp)
        if operand in ("0", "1") and type_ == "pred":
            return f"pred({operand})"
        if re.fullmatch(r"-?\d+", operand) and type_[0] in "bus":
            value, bits = int(operand), BITS[type_]
            if not -(1 << bits - 1) <= value < 1 << bits:
                raise self.error(f"{opcode}: {operand} is no number of {bits} bits")
            return f"{type_}({value % (1 << bits)}u{'ll' if bits == 64 else ''})"
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", operand) and type_ == "f32":
            return f"bits<f32>(0x{operand[2:]}u)"
        if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", operand) and type_ == "f64":
            return f"bits<f64>(u64(0x{operand[2:]}u))"
        if opcode == "mov.u32" and operand in SPECIAL:
            return f"special_{operand[1:].replace('.', '_')}()"
        if opcode == "mov.u32" and operand in self.shared:
            return "u32(0)"  # an address in shared memory is an offset in the block's
        if opcode == "mov.b64" and operand in self.parameters:
            return f"b64({self.parameters[operand]})"
        raise self.error(f"{opcode}: the operand {operand} cannot be read as {type_}")

    def elements(self, type_: str, operand: str) -> list[str]:
        if not re.fullmatch(r"\{.*\}", operand):
            raise self.error(f"expected a vector in braces, got {operand}")
        parts = [part.strip() for part in operand[1:-1].split(",")]
        if len(parts) != int(type_[-1]):
            raise self.error(f"expected {type_[-1]} in {operand}")
        return parts

    def address(self, type_: str, operand: str, opcode: str) -> str:
        found = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", operand)
        if not found:
            raise self.error(f"{opcode}: {operand} is not an address")
        offset = int(found[2] or 0)
        if opcode.startswith("ld.param") and found[1] in self.parameters:
            return f"b64({self.parameters[found[1]] + offset})"
        known = self.register(found[1])
        if not known or known[1] != type_:
            raise self.error(f"{opcode}: {found[1]} is not a register of an address, of {BITS[type_]} bits")
        return f"{known[0]} + {type_}({offset})"

    def write(self, type_: str, operand: str, value: str, opcode: str) -> str:
        if is_vector(type_):
            parts = self.elements(type_, operand)
            return "".join(self.write(type_[:-2], p, f"{value}[{i}]", opcode) for i, p in enumerate(parts))
        known = self.register(operand)
        if not known:
            raise self.error(f"{opcode}: {operand} is not a register")
        cpp, own = known
        if opcode.startswith("ld.") and type_[0] == "u" and BITS[type_] < BITS[own]:
            return f"{cpp} = {own}({value}); "  # what is loaded may be wider in the register
        if BITS[own] != BITS[type_]:
            raise self.error(f"{opcode}: {operand} has {BITS[own]} bits, expected {BITS[type_]}")
        return f"{cpp} = {as_type(own, type_, value)}; "

    # ---- Statements --------------------------------------------------------------------------------------------------
    def instruction(self, text: str) -> None:
        guard = ""
        found = re.match(r"@(!?)(%\w+)\s+", text)
        if found:
            known = self.register(found[2])
            if not known or known[1] != "pred":
                raise self.error(f"{found[2]} is not a predicate")
            guard, text = f"if ({found[1]}{known[0]}) ", text[found.end() :]
        opcode, _, rest = text.partition(" ") if re.match(r"\S+\s", text) else (text, "", "")
        if opcode not in WHITELIST:
            raise self.error(f"the opcode {opcode} is not on the whitelist: {text}")
        operands = re.findall(r"(?:\{[^{}]*\}|[^,{}])+", rest)
        if ",".join(operands) != rest:
            raise self.error(f"the operands of {text} cannot be told apart")
        self.text.append(f"{guard}{{ {self.statement(opcode, [operand.strip() for operand in operands])}}}")

    def statement(self, opcode: str, operands: list[str]) -> str:
        forms = WHITELIST[opcode]
        if len(forms) > 1:  # of mov, by what is in braces
            braces = [operand.startswith("{") for operand in operands]
            forms = [f for f in forms if [is_vector(t) for t in (*f.written, *f.read)] == braces]
        if not forms:
            raise self.error(f"{opcode}: no form for the operands {', '.join(operands)}")
        form = forms[0]
        if len(form.written) == 2:
            operands = [part.strip() for part in operands[0].split("|")] + operands[1:]
        if len(operands) != len(form.written) + len(form.read):
            raise self.error(f"{opcode}: {len(operands)} operands: {', '.join(operands)}")
        if opcode in ("bra", "bra.uni"):
            return f"goto {label_of(operands[0])}; "
        if opcode == "ret":
            return "return; "
        written, read = operands[: len(form.written)], operands[len(form.written) :]
        arguments = [self.read(t, o, opcode) for t, o in zip(form.read, read, strict=True)]
        if re.match(r"ld|st|atom|shfl|mma|cp|bar|trap", opcode):
            arguments.append(f'"{self.file}:{self.line}: {opcode}"')
        call = f"{form.function}({', '.join(arguments)})"
        if not written:
            return f"{call}; "
        if len(written) == 1 and not is_vector(form.written[0]):
            return self.write(form.written[0], written[0], call, opcode)
        parts = ["got"] if len(written) == 1 else ["got.value", "got.predicate"]
        both = zip(form.written, written, parts, strict=True)
        return f"const auto got = {call}; " + "".join(self.write(t, o, part, opcode) for t, o, part in both)

    def declare(self, directive: str) -> None:
        found = re.fullmatch(r"\.reg \.(\w+)\s+(%\w+)(?:<(\d+)>)?", directive)
        if not found or found[1] not in REGISTERS:
            raise self.error(f"registers of an unknown kind: {directive}")
        names = [found[2]] if not found[3] else [f"{found[2]}{i}" for i in range(int(found[3]))]
        for name in names:
            cpp = f"{name[1:]}_" if len(self.scopes) == 1 else f"{name[1:]}_{self.scope_count}"
            self.scopes[-1][name] = cpp, found[1]

    def body(self, lines: Iterator[tuple[int, str]]) -> None:
        pending = ""
        for self.line, line in lines:
            pending = f"{pending} {line}".strip()
            while pending:
                label = re.match(r"(\$\w+):", pending)
                if pending[0] == "{":
                    self.scopes.append({})
                    self.scope_count += 1
                    pending = pending[1:].strip()
                elif pending[0] == "}":
                    self.scopes.pop()
                    pending = pending[1:].strip()
                    if not self.scopes:
                        if pending:
                            raise self.error(f"after the kernel's end: {pending}")
                        return
                elif label:
                    if len(self.scopes) > 1:
                        raise self.error(f"the label {label[1]} in inner braces")
                    self.text.append(f"{label_of(label[1])}:;")
                    pending = pending[label.end() :].strip()
                elif ";" in pending:
                    text, _, rest = pending.partition(";")
                    text, pending = " ".join(text.split()), rest.strip()
                    if text.startswith(".reg "):
                        self.declare(text)
                    elif text != '.pragma "nounroll"':
                        self.instruction(text)
                else:
                    break
        raise self.error("the kernel has no end")

    def cpp(self) -> str:
        registers = "".join(f"  {type_} {name}{{}};\n" for name, type_ in self.used.items())
        used = "\n  ".join(self.text)
        return (
            f"void kernel_{self.number}() {{\n{registers}  {used}\n}}\n"
            f'const Add add_{self.number}{{"{without_hash(self.name)}", kernel_{self.number}, '
            f"{self.parameter_bytes}, {self.max_threads}}};\n"
        )


def label_of(name: str) -> str:
    return name.replace("$", "label_")


def translate(file: Path, wanted: list[str]) -> str:
    """C++ of the kernels whose names, `kernel<arguments>(parameters)`, begin with what one of `wanted` matches."""
    lines = [(n, line.split("//")[0].strip()) for n, line in enumerate(file.read_text().splitlines(), 1)]
    rest = iter([(n, line) for n, line in lines if line])
    names = re.findall(r"^(?:\.visible )?\.entry (\w+)\($", file.read_text(), re.MULTILINE)
    plain = dict(zip(names, plain_names(names), strict=True))
    for pattern in wanted:
        if not any(re.match(pattern, name) for name in plain.values()):
            raise Unsupported(f"{file.name}: none of the {len(names)} kernels matches {pattern}")
    shared: set[str] = set()
    kernels: list[Kernel] = []
    for n, line in rest:
        found = re.fullmatch(r"(?:\.visible )?\.entry (\w+)\(", line)
        array = re.fullmatch(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];", line)
        if array:
            shared.add(array[1])
        elif found:
            kernel = Kernel(file.name, found[1], len(kernels), shared)
            for kernel.line, line in rest:
                if line == "{":
                    break
                threads = re.fullmatch(r"\.maxntid (\d+), (\d+), (\d+)", line)
                if line.startswith(".param "):
                    kernel.add_parameter(line.rstrip(","))
                elif threads:
                    kernel.max_threads = int(threads[1]) * int(threads[2]) * int(threads[3])
                elif line != ")" and not re.fullmatch(r"\.minnctapersm \d+", line):
                    raise kernel.error(f"unknown at a kernel's beginning: {line}")
            kernel.scopes.append({})
            if any(re.match(pattern, plain[found[1]]) for pattern in wanted):
                kernel.body(rest)
                kernels.append(kernel)
            else:
                skip_body(rest)
        elif not re.fullmatch(r"\.version \S+|\.target sm_\d+|\.address_size 64", line):
            raise Unsupported(f"{file.name}:{n}: unknown outside of kernels: {line}")
    return (
        '#include "instructions.h"\n\nnamespace fastseq::cuda::emulation::ptx {\nnamespace {\n'
        + "".join(kernel.cpp() for kernel in kernels)
        + "}  // namespace\n}  // namespace fastseq::cuda::emulation::ptx\n"
    )


def skip_body(lines: Iterator[tuple[int, str]]) -> None:
    depth = 1
    for _, line in lines:
        depth += line.count("{") - line.count("}")
        if depth == 0:
            return


def plain_names(names: list[str]) -> list[str]:
    """As C++ has them, without namespaces."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    return [re.sub(r"(fastseq|cuda|emulation|\(anonymous namespace\))::|^void ", "", line) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ptx", type=Path)
    parser.add_argument("cpp", type=Path)
    parser.add_argument("kernels", nargs="+", help="what the names of those wanted begin with: regular expressions")
    arguments = parser.parse_args()
    try:
        arguments.cpp.write_text(translate(arguments.ptx, arguments.kernels))
    except Unsupported as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
