"""One guided call at a time over the same modules.

A call exchanges the attributes of its pipeline, hooks the denoiser to count, and may switch adapters and offloading; a
second one over the same modules waits until the first is over.  The same thread may go on, so that a reward can call the
pipeline that it is asked by.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline
from torch import nn

_LOCKS: WeakKeyDictionary[object, threading.RLock] = WeakKeyDictionary()
_GUARD = threading.Lock()


@contextmanager
def turn_of(pipe: DiffusionPipeline) -> Iterator[None]:
    """Wait until no other thread samples with this pipeline or with any of its modules."""
    shared = [pipe, *(m for m in vars(pipe).values() if isinstance(m, nn.Module))]
    with _GUARD:
        locks = {id(o): _LOCKS.setdefault(o, threading.RLock()) for o in shared}
    with ExitStack() as held:
        for _, lock in sorted(locks.items()):  # in one order, so that two calls never wait for each other
            held.enter_context(lock)
        yield
