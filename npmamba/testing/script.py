"""The program that shows what a function makes of one case."""

from __future__ import annotations

from typing import Any

import numpy as np

_TEMPLATE = '''"""Compares {target} with the exact result."""

import sys
{imports}
from npmamba.testing.cases import {names}
from npmamba.testing.comparison import compare, outputs
from npmamba.testing.oracles import {oracle}
from npmamba.testing.tolerance import {tolerance}

from {module} import {root}

case = {case!r}
arguments = case.arguments({dtype})
expected = {oracle}(arguments)
allowed = {tolerance}(arguments)
found = outputs({function}, arguments)

np.set_printoptions(threshold=50, precision=9)
for name, x in arguments.items():
    print(f"{{name}} = {{x!r}}")
differences = compare(found, expected, allowed)
print(*differences, sep="\\n")
sys.exit(any(difference.units > 1 for difference in differences))
'''


def script(case: Any, target: str, dtype: Any) -> str:
    """Return the program of ``case.script``.

    >>> from npmamba.testing.cases import UpdateCase
    >>> "from kernels import step" in script(UpdateCase(1, 1, 1), "kernels:step", np.float32)
    True
    """
    module, colon, function = target.partition(":")
    if not (module and colon and function):
        raise ValueError(f"script: target must be 'module:function', got {target!r}")
    kind, name = type(case).__name__, np.dtype(dtype).name
    operation = kind.removesuffix("Case").lower()
    short = name == "bfloat16"
    return _TEMPLATE.format(
        target=target,
        imports="\nimport ml_dtypes\nimport numpy as np\n" if short else "\nimport numpy as np\n",
        names=", ".join(sorted({kind, kind.replace("Case", "Options")})),
        oracle=f"exact_{operation}",
        tolerance=f"{operation}_tolerance",
        module=module,
        root=function.partition(".")[0],
        case=case,
        dtype=f"ml_dtypes.{name}" if short else f"np.{name}",
        function=function,
    )
