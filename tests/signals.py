"""Signals to programs that tests start."""

import signal
from functools import partial

# For `preexec_fn`: what a job in the background starts ignores Ctrl-C otherwise.
heed_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
