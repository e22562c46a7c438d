"""A progress bar for a generation, on a terminal or in a notebook. Needs tqdm."""

import os
import sys
from typing import Any, Self

from .models import Phase, ProgressEvent

_TITLES = {
    Phase.queued: "queued",
    Phase.load: "loading the model",
    Phase.encode: "encoding the prompt",
    Phase.denoise: "denoising",
    Phase.decode: "decoding",
}


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def wants_progress(
    asked: bool | None,  # None: in a notebook and on a terminal
) -> bool:
    """Whether a progress bar is shown; the environment variable TQDM_DISABLE=1 turns the default off."""
    if asked is not None:
        return asked
    if os.environ.get("TQDM_DISABLE", "") not in ("", "0"):
        return False
    return in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


class ProgressBar:
    """Shows `ProgressEvent`s: the phase, the step, seconds per step and the time left; gone when it is closed.

    Raises `ImportError` if tqdm is missing.
    """

    def __init__(self) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            raise ImportError("a progress bar needs tqdm: pip install tqdm, or pass progress=False") from None
        self._bar: Any = tqdm(
            total=None, leave=False, unit="step", dynamic_ncols=True, disable=False, bar_format="{desc}: {elapsed}"
        )

    def __call__(self, event: ProgressEvent) -> None:
        """Show an event."""
        if event.phase not in _TITLES:
            return
        title = _TITLES[event.phase]
        if event.phase is Phase.queued and event.queue_position:
            title = f"queued behind {event.queue_position}"
        if event.total_steps and self._bar.total != event.total_steps:
            self._bar.bar_format = None
            self._bar.reset(total=event.total_steps)
        self._bar.set_description_str(title, refresh=False)
        if event.step is not None:
            self._bar.update(event.step - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
