"""Issuances commit fewer states: what an older release left in one that is gone goes on from the one before.

Revision: 0008, follows 0007.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

GOES_ON = {
    "key_ready": "queued", "published": "validating", "authorized": "validating", "finalize_intent": "finalizing",
    "issued": "finalizing",
}  # fmt: skip
"""What was done between the two is done again: a key that nobody has seen is made, an order is read."""


def upgrade() -> None:
    for gone, state in GOES_ON.items():
        op.execute(f"UPDATE issuances SET state = '{state}' WHERE state = '{gone}'")


def downgrade() -> None:
    pass  # an older release knows every state that this one commits
