"""How work tells what it does: whoever asks for it, the command line or a program, passes these in."""

from collections.abc import Callable, Iterable
from typing import Any

Say = Callable[[str], None]
"""Shows what was found: one line or several."""
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""(items, what is done to them) -> the same items, while something shows how many are done."""
