"""The shared core library: what a gateway configuration is and when a certificate is renewed.

Everything here is pure: facts and an instant in, a decision or a value out. No time, no chance,
no I/O, no logging.
"""
