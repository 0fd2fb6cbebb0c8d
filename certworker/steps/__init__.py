"""The moves. Each reads what the one before left in the database and leaves a row for the next.

reconcile → scan → issue → publish → verify, with expire and reap beside them. A step gets values and
a clock, never the settings; it may be run at any time, twice, or stopped anywhere.
"""
