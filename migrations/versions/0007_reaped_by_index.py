"""Indexes by which the reaper finds what has served its time, and certificates with a fault are counted.

Revision: 0007, follows 0006.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_certificates_error": "certificates (updated_at) WHERE status = 'error'",
    "ix_issuances_ended": "issuances (not_after) WHERE closed_at IS NOT NULL AND not_after IS NOT NULL",
    "ix_issuances_fruitless": "issuances (closed_at) WHERE closed_at IS NOT NULL AND not_after IS NULL",
    "ix_removed_certificates_removed_at": "removed_certificates (removed_at)",
    "ix_thumbprints_removed": "thumbprints (updated_at) WHERE thumbprint IS NULL",
}


def upgrade() -> None:
    for name, index in INDEXES.items():
        op.execute(f"CREATE INDEX {name} ON {index}")
    # Only the reaper used it, and walked past every issuance whose certificate still lives.
    op.execute("DROP INDEX ix_issuances_closed_at")


def downgrade() -> None:
    op.execute("CREATE INDEX ix_issuances_closed_at ON issuances (closed_at) WHERE closed_at IS NOT NULL")
    for name in INDEXES:
        op.execute(f"DROP INDEX {name}")
