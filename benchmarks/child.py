"""``python -m benchmarks.child PART QUESTION DEADLINE SETTING`` (JSON): the process of one question.

A question that hangs or breaks the device loses no other. Started again, it goes on after the case that broke.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.registry import questions
from benchmarks.rows import run_cases
from benchmarks.setting import Setting


def main(part: str, question: str, deadline: str, text: str) -> int:
    setting = Setting.parse(text)
    setting.apply()
    cases = questions()[question].cases(setting)
    if setting.wgmma:
        cases = [replace(case, key=f"{case.key}, wgmma") for case in cases]
    return run_cases(Path(part), question, cases, only=setting.only, deadline=float(deadline))


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a device that broke would hang the interpreter's own end
