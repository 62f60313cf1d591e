"""What a log may say of an exception: its class and where it arose. Its words may quote what a person wrote."""

from __future__ import annotations

from pathlib import PurePath


def place(error: BaseException) -> str:
    """``KeyError at nodes.py:120 in on_turn``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    code = trace.tb_frame.f_code
    return f"{type(error).__name__} at {PurePath(code.co_filename).name}:{trace.tb_lineno} in {code.co_name}"
