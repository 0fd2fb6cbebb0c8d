"""ACME certificate automation for a fleet of reverse proxies."""
