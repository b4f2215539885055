"""Error messages as golden text: caught, and folded to the width of a source line."""

import textwrap

import pytest


def message(call, *args, error=ValueError, **kwargs) -> str:
    """The message that ``call(*args, **kwargs)`` raises."""
    with pytest.raises(error) as raised:
        call(*args, **kwargs)
    return str(raised.value)


def folded(*messages: str) -> str:
    """Messages one below the other, long ones continued with an indent."""
    fold = textwrap.TextWrapper(96, subsequent_indent="    ", break_on_hyphens=False).fill
    return "\n".join(map(fold, messages))
