"""How many cores there are to use.

Test: pytest tests/test_cores.py
"""

import os


def usable_cores() -> int:
    """Return the cores that this process may use; affinity is unknown outside Linux, where all are counted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
