"""Speaks RFC 8555 (ACME) with one CA: messages, keys, requests.

One call is one look or one act: nothing here waits, polls or asks the time. `client` is the door;
`transport` carries its requests; `problems` turns what went wrong into what to do next.
"""
