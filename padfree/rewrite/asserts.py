"""`assert` statements in a forward that is traced: what they ask of shapes stays asked."""

from __future__ import annotations

import dis
import types

_BETWEEN = ("TO_BOOL", "COPY", "NOT_TAKEN", "CACHE", "EXTENDED_ARG", "COMPARE_OP", "CONTAINS_OP", "IS_OP")


def asserted(frame: types.FrameType) -> tuple[bool, str] | None:
    """What an `assert` that a frame is in the middle of wants the value it tests to be, and its message.

    None where the value decides on anything else.
    """
    steps = [step for step in dis.get_instructions(frame.f_code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    at = next((index for index, step in enumerate(steps) if step.offset >= frame.f_lasti), len(steps))
    while at < len(steps) and steps[at].opname in _BETWEEN:
        at += 1
    if at >= len(steps) or "JUMP" not in steps[at].opname or "IF_" not in steps[at].opname:
        return None
    jump = steps[at]
    wanted = jump.opname.endswith("TRUE")  # to go round what follows
    follows = next((index for index in range(at + 1, len(steps)) if steps[index].opname != "NOT_TAKEN"), at)
    target = next((index for index, step in enumerate(steps) if step.offset == jump.argval), at)
    for index, value in ((follows, wanted), (target, not wanted)):
        if _raises(steps[index]):
            said, then = [*steps[index + 1 : index + 3], jump, jump][:2]
            plain = said.opname == "LOAD_CONST" and then.opname in ("PRECALL", "CALL", "CALL_FUNCTION")
            message = said.argval if plain and isinstance(said.argval, str) else ""
            return value, message
    return None


def _raises(step: dis.Instruction) -> bool:
    """Whether a failed assert begins here, by the byte code of Python up to 3.13, or of later ones."""
    later = step.opname == "LOAD_COMMON_CONSTANT" and "AssertionError" in step.argrepr
    return later or step.opname == "LOAD_ASSERTION_ERROR"
