"""`node.tables.build` as a program, at the lowest priority before its imports: these are half of a small build."""

from __future__ import annotations

import contextlib
import os
import sys

from node.kernel.limits import TABLE_BUILD_NICENESS

if __name__ == "__main__":
    with contextlib.suppress(OSError):
        os.nice(TABLE_BUILD_NICENESS)
    from node.tables.build import main

    sys.exit(main())
