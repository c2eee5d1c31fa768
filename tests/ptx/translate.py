"""Translates PTX, what nvcc makes of a kernel for a GPU, to C++: a function per kernel, which runs one thread.

translate.py IN.ptx OUT.cpp. What the functions call is in device.h, and runtime.cpp starts them. An instruction, modifier or
operand that is not known here ends the translation: nothing is guessed.

Source:
    NVIDIA, Parallel Thread Execution ISA, section 9 (instructions); rounding, saturation and shifts past the width as it says.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

# PTX type -> C++ type of a value; registers are of the plain type of their width, as PTX lets instructions choose the reading
VALUES = {
    **{f"{kind}{bits}": f"{sign}int{bits}_t" for bits in (8, 16, 32, 64) for kind, sign in (("u", "u"), ("b", "u"), ("s", ""))},
    **{"f16": "Half", "bf16": "BFloat16", "f32": "float", "f64": "double", "pred": "bool"},
}
REGISTERS = {**{f"b{bits}": f"uint{bits}_t" for bits in (16, 32, 64)}, "f32": "float", "f64": "double", "pred": "bool"}
FLOATS = ("f16", "bf16", "f32", "f64")
SPECIAL = {
    f"%{name}.{axis}": f"t.{name}[{place}]" for name in ("tid", "ntid", "ctaid", "nctaid") for place, axis in enumerate("xyz")
}
COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
BITWISE = {"and": "&", "or": "|", "xor": "^"}


class Unknown(Exception):
    """What this translator has not been taught."""


def bits_of(kind: str) -> int:
    """Return the width of a type."""
    found = re.search(r"\d+", kind)
    if found is None:
        raise Unknown(f"type {kind}")
    return int(found[0])


def name_of(symbol: str) -> str:
    """Return a register's or label's name as C++ has it."""
    return re.sub(r"\W", "_", symbol.replace("%", "r_").replace("$", "l_"))


def split(operands: str) -> list[str]:
    """Return operands, a vector in braces or an address in brackets being one."""
    return [one.strip() for one in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,{[\s][^,]*", operands)]


class Kernel:
    """One kernel and the C++ that it becomes."""

    def __init__(self, name: str, parameters: str, body: str) -> None:
        self.name = name
        self.parameters = {one: place for place, one in enumerate(re.findall(r"(\w+_param_\d+)", parameters))}
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        self.waits = False  # whether its threads wait for each other, and so cannot run one after the other
        self.lines: list[str] = []
        self.instructions = 0
        for align, symbol, size in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];", body):
            self.shared_bytes = -(-self.shared_bytes // int(align)) * int(align)
            self.shared[symbol] = self.shared_bytes
            self.shared_bytes += int(size)
        body = re.sub(r"\.shared [^;]*;", "", body)
        body = re.sub(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", self._registers, body)
        # of inner blocks, several of which may have one of the same name and none reads what another wrote
        for kind, name in dict.fromkeys(re.findall(r"\.reg \.(\w+) (%?\w+);", body)):
            self.lines.append(f"  {REGISTERS[kind]} {name_of(name)}{{}};")
        body = re.sub(r"\.reg \.\w+ %?\w+;", "", body)
        for statement in re.split(r"[;\n]", re.sub(r"(\$\w+:)", r"\1;", re.sub(r"(?<![,\w]) *[{}](?=\s|$)", " ", body))):
            self._statement(" ".join(statement.split()))

    def _registers(self, found: re.Match[str]) -> str:
        names = ", ".join(f"r_{found[2]}{n}{{}}" for n in range(int(found[3])))
        self.lines.append(f"  {REGISTERS[found[1]]} {names};")
        return ""

    def _statement(self, text: str) -> None:
        if not text or text.startswith((".loc", ".pragma", ".file")):
            return
        if text.endswith(":"):
            self.lines.append(f"{name_of(text[:-1])}:;")
            return
        guard = ""
        if found := re.match(r"@(!?)(%\w+) ", text):
            guard, text = f"if ({found[1]}{name_of(found[2])}) ", text[found.end() :]
        self.instructions += 1
        code, _, rest = text.partition(" ")
        base, *modifiers = code.split(".")
        handle: Callable[[list[str], list[str]], str] | None = getattr(self, f"_{base}", None)
        if handle is None:
            raise Unknown(f"{text} in {self.name}")
        self.lines.append(f"  {guard}{handle(modifiers, split(rest))}")

    # ---- operands

    def value(self, operand: str, kind: str) -> str:
        """Return the C++ of an operand read as a type."""
        wanted = VALUES[kind]
        if operand in SPECIAL:
            return f"{wanted}({SPECIAL[operand]})"
        if operand.startswith("!"):
            return f"!{name_of(operand[1:])}"
        if operand.startswith("%"):
            return f"read<{wanted}>({name_of(operand)})"
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", operand):
            return f"read<{wanted}>(uint{len(found[1] or found[2]) * 4}_t(0x{found[1] or found[2]}u))"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            return f"{wanted}({number % 2**64:#x}u)" if kind != "pred" else str(bool(number)).lower()
        if operand in self.shared or operand == "pysal_dynamic_shared":
            return f"{wanted}({self.shared.get(operand, self.shared_bytes)})"
        if operand in self.parameters:
            return f"{wanted}(uintptr_t(t.arguments[{self.parameters[operand]}]))"
        if re.fullmatch(r"[A-Za-z_]\w*", operand):  # a register of an inner block
            return f"read<{wanted}>({operand})"
        raise Unknown(f"operand {operand} in {self.name}")

    def address(self, operand: str) -> str:
        """Return the C++ of an address in brackets."""
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)  # [base] or [base+offset]
        if found is None:
            raise Unknown(f"address {operand} in {self.name}")
        kind = f"b{8 * 8}" if found[1].startswith("%rd") or not found[1].startswith("%") else "b32"
        return f"uint64_t({self.value(found[1], kind)}) + uint64_t(int64_t({found[2] or 0}))"

    def into(self, operand: str, kind: str, expression: str) -> str:
        """Return the C++ that writes a value of a type into a register."""
        return f"write<{VALUES[kind]}>({name_of(operand)}, {expression});"

    def only(self, modifiers: list[str], *known: str) -> None:
        """Refuse a modifier that changes what an instruction does."""
        if unknown := set(modifiers[:-1]) - set(known):
            raise Unknown(f"modifier {', '.join(sorted(unknown))} in {self.name}")

    # ---- control, and threads that meet

    def _ret(self, modifiers: list[str], operands: list[str]) -> str:
        return "return;"

    def _bra(self, modifiers: list[str], operands: list[str]) -> str:
        return f"goto {name_of(operands[0])};"

    def _bar(self, modifiers: list[str], operands: list[str]) -> str:
        self.waits = True
        if modifiers[0] == "warp":
            return f"t.meet_warp({self.value(operands[0], 'b32')}, {self.instructions});"
        if modifiers[0] != "sync" or operands != ["0"]:
            raise Unknown(f"bar.{'.'.join(modifiers)} {operands}")
        return f"t.meet_block({self.instructions});"

    _barrier = _bar

    def _vote(self, modifiers: list[str], operands: list[str]) -> str:
        self.waits = True
        if modifiers != ["sync", "ballot", "b32"]:
            raise Unknown(f"vote.{'.'.join(modifiers)}")
        found = f"t.ballot({self.value(operands[1], 'pred')}, {self.value(operands[2], 'b32')}, {self.instructions})"
        return self.into(operands[0], "b32", found)

    def _shfl(self, modifiers: list[str], operands: list[str]) -> str:
        self.waits = True
        if modifiers != ["sync", "bfly", "b32"]:
            raise Unknown(f"shfl.{'.'.join(modifiers)}")
        target, *rest = operands
        given = ", ".join(self.value(one, "b32") for one in (rest[0], rest[1], rest[3]))
        return self.into(target.split("|")[0], "b32", f"t.butterfly({given}, {self.instructions})")

    # ---- memory

    def _ld(self, modifiers: list[str], operands: list[str]) -> str:
        return self._access(modifiers, operands[0], operands[1], "load")

    def _st(self, modifiers: list[str], operands: list[str]) -> str:
        return self._access(modifiers, operands[1], operands[0], "store")

    def _access(self, modifiers: list[str], registers: str, address: str, way: str) -> str:
        self.only(modifiers, "param", "global", "shared", "nc", "v2", "v4")
        kind, several = modifiers[-1], [one.strip() for one in registers.strip("{}").split(",")]
        space, size = modifiers[0], bits_of(kind) // 8
        code = f"{{ const uint64_t at = {self.address(address)}; "
        if space != "param":  # which the stand-in for the runtime holds
            code += f"t.check_{space}(at, {size * len(several)}, {self.instructions}); "
        for place, register in enumerate(several):
            where = f"t.{space}(at + {place * size})" if space == "shared" else f"at + {place * size}"
            if way == "load":
                code += self.into(register, kind, f"load<{VALUES[kind]}>({where})") + " "
            else:
                code += f"store<{VALUES[kind]}>({where}, {self.value(register, kind)}); "
        return code + "}"

    def _mov(self, modifiers: list[str], operands: list[str]) -> str:
        kind, (target, source) = modifiers[-1], operands
        if target.startswith("{"):
            parts = [one.strip() for one in target.strip("{}").split(",")]
            width = bits_of(kind) // len(parts)
            code = f"{{ const uint64_t whole = {self.value(source, f'b{bits_of(kind)}')}; "
            for place, part in enumerate(parts):
                code += self.into(part, f"b{width}", f"uint{width}_t(whole >> {width * place})") + " "
            return code + "}"
        if source.startswith("{"):
            parts = [one.strip() for one in source.strip("{}").split(",")]
            width = bits_of(kind) // len(parts)
            joined = " | ".join(f"uint64_t({self.value(one, f'b{width}')}) << {width * n}" for n, one in enumerate(parts))
            return self.into(target, f"b{bits_of(kind)}", f"uint{bits_of(kind)}_t({joined})")
        return self.into(target, kind, self.value(source, kind))

    def _cvta(self, modifiers: list[str], operands: list[str]) -> str:
        return self.into(operands[0], "u64", self.value(operands[1], "u64"))

    # ---- arithmetic

    def _calculate(self, base: str, modifiers: list[str], operands: list[str]) -> str:
        kind = modifiers[-1]
        if kind in FLOATS:
            return self._floats(base, modifiers, operands)
        bits, (target, *sources) = bits_of(kind), operands
        plain = f"uint{bits}_t"
        values = [self.value(one, kind) for one in sources]
        if base in ("mul", "mad"):
            self.only(modifiers, "lo", "hi", "wide")
            if "wide" in modifiers:
                wide = f"{kind[0]}{2 * bits}"
                product = f"{VALUES[wide]}({values[0]}) * {VALUES[wide]}({values[1]})"
                return self.into(target, wide, product + (f" + {self.value(sources[2], wide)}" if base == "mad" else ""))
            if "hi" in modifiers:
                if kind != "u32" or base == "mad":
                    raise Unknown(f"{base}.hi.{kind}")
                return self.into(target, kind, f"uint32_t(uint64_t({values[0]}) * uint64_t({values[1]}) >> 32)")
            product = f"uint64_t({values[0]}) * uint64_t({values[1]})"
            return self.into(target, f"u{bits}", f"{plain}({product}{f' + uint64_t({values[2]})' if base == 'mad' else ''})")
        self.only(modifiers)
        expressions = {
            "add": lambda: f"{plain}(uint64_t({values[0]}) + uint64_t({values[1]}))",
            "sub": lambda: f"{plain}(uint64_t({values[0]}) - uint64_t({values[1]}))",
            "neg": lambda: f"{plain}(0 - uint64_t({values[0]}))",
            "abs": lambda: f"{plain}({values[0]} < 0 ? 0 - uint64_t({values[0]}) : uint64_t({values[0]}))",
            "div": lambda: f"{plain}(quotient({values[0]}, {values[1]}))",
            "rem": lambda: f"{plain}(remainder_of({values[0]}, {values[1]}))",
            "min": lambda: f"{plain}(std::min({values[0]}, {values[1]}))",
            "max": lambda: f"{plain}(std::max({values[0]}, {values[1]}))",
        }
        if base not in expressions:
            raise Unknown(f"{base}.{'.'.join(modifiers)}")
        return self.into(target, f"u{bits}", expressions[base]())

    def _floats(self, base: str, modifiers: list[str], operands: list[str]) -> str:
        kind, (target, *sources) = modifiers[-1], operands
        values = [self.value(one, kind) for one in sources]
        if base == "add" and modifiers[0] == "rz" and kind == "f32":
            return self.into(target, kind, f"add_towards_zero({values[0]}, {values[1]})")
        if base == "rcp" and modifiers == ["approx", "ftz", "f64"]:
            return self.into(target, kind, f"rough_reciprocal({values[0]})")
        if modifiers == ["approx", "ftz", "f32"] and base in ("ex2", "rcp"):
            return self.into(target, kind, f"{'power_of_two' if base == 'ex2' else 'flushed_reciprocal'}({values[0]})")
        if base == "fma" and modifiers == ["rm", "f32"]:
            return self.into(target, kind, f"fma_down({', '.join(values)})")
        self.only(modifiers, "rn")  # round to nearest even: what this translation's own arithmetic does
        if kind not in ("f32", "f64"):
            raise Unknown(f"{base}.{kind}")
        if base in ARITHMETIC:
            return self.into(target, kind, f"{values[0]} {ARITHMETIC[base]} {values[1]}")
        if base == "rcp" and modifiers[:-1] == ["rn"]:
            return self.into(target, kind, f"{VALUES[kind]}(1) / {values[0]}")
        function = {
            "fma": "std::fma",
            "min": "std::fmin",
            "max": "std::fmax",
            "abs": "std::fabs",
            "sqrt": "std::sqrt",
            "neg": "-",
            "copysign": "std::copysign",
        }
        if base not in function or (base == "sqrt" and "rn" not in modifiers):
            raise Unknown(f"{base}.{'.'.join(modifiers)}")
        if base == "copysign":
            values.reverse()  # the sign comes first
        return self.into(target, kind, f"{function[base]}({', '.join(values)})")

    def _bits(self, base: str, modifiers: list[str], operands: list[str]) -> str:
        kind, (target, *sources) = modifiers[-1], operands
        values = [self.value(one, kind) for one in sources[: 1 if base in ("shl", "shr") else None]]
        if base == "not":
            return self.into(target, kind, f"!{values[0]}" if kind == "pred" else f"{VALUES[kind]}(~{values[0]})")
        if base in BITWISE:
            return self.into(target, kind, f"{VALUES[kind]}({values[0]} {BITWISE[base]} {values[1]})")
        by, bits = self.value(sources[1], "u32"), bits_of(kind)
        if base == "shr" and kind.startswith("s"):
            return self.into(target, kind, f"{VALUES[kind]}({values[0]} >> std::min<uint32_t>({by}, {bits - 1}))")
        shifted = f"uint64_t({values[0]}) {'<<' if base == 'shl' else '>>'} {by}"
        return self.into(target, kind, f"{VALUES[kind]}({by} >= {bits} ? 0 : {shifted})")

    def _setp(self, modifiers: list[str], operands: list[str]) -> str:
        if len(modifiers) != 2:
            raise Unknown(f"setp.{'.'.join(modifiers)}")
        (comparison, kind), (target, *sources) = modifiers, operands
        one, other = (self.value(source, kind) for source in sources)
        if kind not in FLOATS:
            return f"{name_of(target)} = {one} {COMPARISONS[comparison]} {other};"
        unordered = f"(std::isnan({one}) || std::isnan({other}))"
        if comparison in ("nan", "num"):
            return f"{name_of(target)} = {'' if comparison == 'nan' else '!'}{unordered};"
        if comparison.endswith("u") and comparison[:-1] in COMPARISONS:
            return f"{name_of(target)} = {unordered} || {one} {COMPARISONS[comparison[:-1]]} {other};"
        return f"{name_of(target)} = !{unordered} && {one} {COMPARISONS[comparison]} {other};"

    def _selp(self, modifiers: list[str], operands: list[str]) -> str:
        target, one, other, chosen = operands
        kind = modifiers[-1]
        return self.into(target, kind, f"{self.value(chosen, 'pred')} ? {self.value(one, kind)} : {self.value(other, kind)}")

    def _cvt(self, modifiers: list[str], operands: list[str]) -> str:
        to, of = modifiers[-2:]
        given, how = self.value(operands[1], of), set(modifiers[:-2])
        if modifiers == ["sat", "f32", "f32"]:
            return self.into(operands[0], to, f"saturated({given})")
        if how - {"rn", "rni", "rzi"}:
            raise Unknown(f"cvt.{'.'.join(modifiers)}")
        if of in FLOATS and to not in FLOATS:
            if how != {"rzi"}:
                raise Unknown(f"cvt.{'.'.join(modifiers)}")
            return self.into(operands[0], to, f"whole<{VALUES[to]}>({given})")
        if of in FLOATS and how & {"rni", "rzi"}:
            return self.into(operands[0], to, f"std::{'nearbyint' if 'rni' in how else 'trunc'}({given})")
        return self.into(operands[0], to, f"converted<{VALUES[to]}>({given})")

    def _function(self, base: str, modifiers: list[str], operands: list[str]) -> str:
        code = ".".join([base, *modifiers])
        known = {"popc.b32", "brev.b32", "bfind.shiftamt.u32", "clz.b32", "bfi.b32", "bfe.u32"}
        if code not in known:
            raise Unknown(code)
        return self.into(operands[0], "u32", f"{base}({', '.join(self.value(one, 'u32') for one in operands[1:])})")


def _of_group(
    group: Callable[[Kernel, str, list[str], list[str]], str], base: str
) -> Callable[[Kernel, list[str], list[str]], str]:
    return lambda self, modifiers, operands: group(self, base, modifiers, operands)


for _group, _bases in (
    (
        Kernel._calculate,
        ("add", "sub", "mul", "mad", "div", "rem", "min", "max", "neg", "abs", "fma", "sqrt", "rcp", "ex2", "copysign"),
    ),
    (Kernel._bits, ("and", "or", "xor", "not", "shl", "shr")),
    (Kernel._function, ("popc", "brev", "bfind", "clz", "bfi", "bfe")),
):
    for _base in _bases:
        setattr(Kernel, f"_{_base}", _of_group(_group, _base))


def translated(ptx: str) -> str:
    """Return the C++ of all kernels of a module."""
    ptx = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx, flags=re.DOTALL)
    code = ['#include "device.h"', "namespace {"]
    table = []
    for number, found in enumerate(re.finditer(r"\.entry\s+(\w+)\((.*?)\)(.*?)\n\{\n(.*?)\n\}\n", ptx, flags=re.DOTALL)):
        name, parameters, directives, body = found.groups()
        kernel = Kernel(name, parameters, body)
        most = re.search(r"\.maxntid (\d+)", directives)
        code += [f"void kernel_{number}(Thread& t) {{", "  (void)t;", *kernel.lines, "  return;", "}"]
        table.append(
            f'  {{"{name}", kernel_{number}, {str(kernel.waits).lower()}, {kernel.shared_bytes}, {most[1] if most else 0}}},'
        )
    if not table:
        raise Unknown("a module without kernels")
    code += [
        "const Kernel kernels[] = {",
        *table,
        "};",
        "const Registrar registrar(kernels, std::size(kernels));",
        "}  // namespace",
    ]
    return "\n".join(code) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(translated(Path(sys.argv[1]).read_text()))
