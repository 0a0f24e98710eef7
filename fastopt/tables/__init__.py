"""Embedding tables larger than memory, in memory-mapped files that survive a crash.

A table is a folder:

    meta.json     sizes, dtypes, the caller's progress, and G, how many flushes there were
    weights       the rows, one after the other
    state-NAME    the same for each state array
    undo-G        the undo log: what the rows changed after flush G held before
    sums-G        checksums of the rows as at flush G
    meta-G.json   meta.json as it was at flush G; after ``prepare``, the next one too
    lock          locked while the table is open

Rows are changed in place, in the page cache, after the log holds what they were. Opening a table that was
not closed puts the logged rows back, so that it is as at its last flush. Before anything is written,
all of it is checked: a folder may come from anywhere.

What a crash, a full disk and damage leave:

- A process that ends in any way, ``kill -9`` too, leaves the table as at its last flush: the next
  :func:`open_table` undoes what came later, in the rows passed to :meth:`Table.keep` before they were changed
  and in state arrays that were new. Of two flushes the later one counts once its :meth:`Table.commit` renamed
  the meta file; before, the earlier one does.
- A machine that stops (a power failure) leaves a table as at its last flush if no row was kept since, or
  between :meth:`Table.prepare` and :meth:`Table.commit`. Otherwise pages may be on the disk that the log is
  not yet: :func:`open_table` raises ``RuntimeError``, and a copy has to be restored.
- What the caller writes to :attr:`Table.weights` without :meth:`Table.keep` is on the disk after the next
  flush, but is not undone by opening.
- A full disk is an ``OSError``: of :meth:`Table.keep`, which reserves blocks for the pages of its rows, of
  :meth:`Table.state` or of a flush, and the last flush counts. Where a sparse file has no block, what the
  caller writes without :meth:`Table.keep` ends the process by SIGBUS then, and on tmpfs so does reading. File
  systems that write each block anew, as btrfs, can't reserve.
- A log that is cut short, missing or damaged is seen by opening. Changed bits in the rows are not: see
  :meth:`Table.check`.
"""
