"""The structs of both ctypes bindings, the package's and tests/csrc/engine.py, against the C header."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from types import ModuleType

import engine
import pytest

from paddlemix_qwenvl_plugin.engine import build, library

INCLUDE = Path(__file__).parents[2] / "csrc" / "include"


def structs(binding: ModuleType) -> dict[str, type[ctypes.Structure]]:
    """The structs that a binding defines, by their names in the header: StepArgs is qvl_step_args."""
    found = {}
    for name, value in vars(binding).items():
        if isinstance(value, type) and issubclass(value, ctypes.Structure) and value is not ctypes.Structure:
            words = re.findall("[A-Z][a-z]+", "Sequence" if name.startswith("Sequence") else name)
            found["_".join(["qvl", *words]).lower()] = value
    return found


@pytest.mark.parametrize("binding", [library, engine], ids=["package", "tests"])
def test_structs_are_those_of_the_header(binding: ModuleType, tmp_path: Path) -> None:
    """Sizes of the structs, and offsets and sizes of all fields."""
    expected, lines = [], []
    for name, struct in structs(binding).items():
        expected.append(ctypes.sizeof(struct))
        lines.append(f"sizeof({name})")
        for field, *_ in struct._fields_:
            member = field.rstrip("_")  # in_ is a keyword without the underscore
            expected += [getattr(struct, field).offset, getattr(struct, field).size]
            lines += [f"offsetof({name}, {member})", f"sizeof(static_cast<{name}*>(nullptr)->{member})"]
    assert len(expected) > 100
    source, program = tmp_path / "structs.cc", tmp_path / "structs"
    values = ",\n".join(lines)
    source.write_text(
        "#include <cstddef>\n#include <cstdio>\n#include <initializer_list>\n#include <qwenvl.h>\n"
        f'int main() {{ for (std::size_t value : {{{values}}}) std::printf("%zu\\n", value); }}\n'
    )
    subprocess.run([*build.compiler(), "-std=c++17", f"-I{INCLUDE}", source, "-o", program], check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert [int(line) for line in output.split()] == expected
