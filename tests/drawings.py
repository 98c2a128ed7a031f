"""A look at what was drawn, for the tests of figures."""

from __future__ import annotations

import struct


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def texts(fig):
    return [t for t in [*fig.texts, *(t for ax in fig.axes for t in ax.texts)] if t.get_text()]
