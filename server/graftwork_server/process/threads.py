"""The front's threads for blocking work, by what it waits for, so that nothing quick waits behind something slow.

asyncio.to_thread    short reads of the database: every call needs them
FILES                uploads, publications, removals: what reads and writes whole files
HelperPool           one thread for each helper process (text/strangers/helper_pool.py)
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

FILES = ThreadPoolExecutor(8, "files")
"""Work on whole files, and writes to the database that follow it."""
