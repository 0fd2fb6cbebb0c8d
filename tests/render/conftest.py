"""Rendering is judged by the HAProxy that the node's tests run."""

from tests.node.conftest import authority, haproxy_binary

__all__ = ["authority", "haproxy_binary"]
