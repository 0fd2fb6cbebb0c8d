"""What runs on a gateway: it takes versions and certificates from a `Source` and makes a proxy serve them.

No database, no account key and no settings here: everything is handed in.
"""
