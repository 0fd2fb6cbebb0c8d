"""Rendering is judged by the proxies that the node's tests run."""

from tests.node.conftest import authority, haproxy_binary, nginx_binary

__all__ = ["authority", "haproxy_binary", "nginx_binary"]
