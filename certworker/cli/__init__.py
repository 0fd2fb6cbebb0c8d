"""Entrance for people: data on stdout, progress on stderr, one exit code each."""
