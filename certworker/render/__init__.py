"""A snapshot as proxy syntax: functions from values to text. No file is touched here."""
