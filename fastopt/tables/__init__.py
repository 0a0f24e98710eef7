"""Embedding tables larger than memory, in memory-mapped files that survive a crash.

A table is a folder:

    meta.json     sizes, dtypes, the caller's progress, and G, how many flushes there were
    weights       the rows, one after the other
    state-NAME    the same for each state array
    undo-G        the undo log: what the rows changed after flush G held before
    meta-G.json   meta.json as it was at flush G; after ``prepare``, the next one too
    lock          locked while the table is open

Rows are changed in place, in the page cache, after the log holds what they were. Opening a table that was
not closed puts the logged rows back, so that it is as at its last flush.
"""
