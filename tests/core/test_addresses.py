"""Which hosts a target may name."""

import pytest

from certworker.core.addresses import check_target_host, split_address


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("LOCALHOST", "127.0.0.1"),
        ("app", "app"),
        ("app.internal", "app.internal"),
        ("1app.internal", "1app.internal"),
    ],
)
def test_targets_that_are_taken(value: str, canonical: str) -> None:
    assert check_target_host(value) == canonical
    assert check_target_host(canonical) == canonical


@pytest.mark.parametrize(
    "value",
    ["", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "169.254.169.254", "fe80::1", "fe80::1%eth0", "::1%lo",
     "::ffff:169.254.169.254", "::ffff:0.0.0.0", "168.63.129.16", "fd20:ce::254", "metadata.google.internal",
     "METADATA.google.internal", "255.255.255.255", "fd00:ec2::254", "127.1", "2130706433", "0x7f000001", "0x7f.1",
     "010.0.0.1", "1.2.3.4.5", "unix@/run/x.sock", "/run/x.sock", "abns@x", "a b", "a.test disabled", "*.a.test",
     "a.test.", "a\n", "a_b", "é.test"],
)  # fmt: skip
def test_targets_that_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="address"):
        check_target_host(value)


@pytest.mark.parametrize(
    "value", ["", "a", "a:", "a:x", "a:+1", "a:123456", "::1:80", "[a]:80", "[::1]", "[::1]80", "a:1\n", 5, None]
)
def test_what_is_no_host_and_port(value: object) -> None:
    """One form; brackets for IPv6 and for nothing else."""
    with pytest.raises(ValueError, match="host:port"):
        split_address(value)
