"""certworker beside its peers and beside the least that any client could do: `make bench`.

What is compared does the same work: N certificates for one name each, P-256 keys, HTTP-01 through a real listener, a
fresh Pebble without sleeps and refused nonces on the same cores, a cold start, and every certificate is checked
afterwards. Rounds are interleaved (A B C A B C), because a machine is not as fast at all times: read the ratios of one
round, not seconds.
"""
