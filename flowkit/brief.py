"""Values in errors and log lines: short, whatever they are."""

from __future__ import annotations

import reprlib


class _Brief(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:  # noqa: ARG002
        return str(value) if value.bit_length() <= 256 else "a huge number"  # Python does not write the longest ones

    def repr_bytes(self, value: bytes, level: int) -> str:  # noqa: ARG002
        return f"{value[: self.maxstring]!r}{'...' * (len(value) > self.maxstring)}"


_brief = _Brief()
_brief.maxlevel, _brief.maxstring = 3, 60


def brief(value: object) -> str:
    """A value for an error, in 120 characters at most. What somebody else made may be so large, or so nested in itself, that to
    write all of it would take hours."""
    return _brief.repr(value)[:120]
