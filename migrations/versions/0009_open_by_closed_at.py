"""What is open is indexed by `closed_at` and not by `state`: an issuance that moves on leaves these indexes alone.

On PostgreSQL such a move can then be a heap-only tuple update, for which the pages of the table keep some room.

Revision: 0009, follows 0008.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

INDEXES = {
    "uq_issuances_open": "UNIQUE INDEX {} ON issuances (lineage_id) WHERE {open}",
    "ix_issuances_due": "INDEX {} ON issuances (attempt_at) WHERE {open}",
    "ix_issuances_urgent": "INDEX {} ON issuances (attempt_at) WHERE urgent AND {open}",
    "ix_issuances_ordering": "INDEX {} ON issuances (names_hash) WHERE names_hash IS NOT NULL AND {open}",
    "uq_issuances_order_url": "UNIQUE INDEX {} ON issuances (order_url) WHERE order_url IS NOT NULL AND {open}",
}
CLOSED = "('done', 'failed', 'cancelled')"


def upgrade() -> None:
    # Every release closes both together; a row that another program has changed must not be open and closed at once.
    op.execute(f"UPDATE issuances SET closed_at = state_at WHERE state IN {CLOSED} AND closed_at IS NULL")
    op.execute(f"UPDATE issuances SET closed_at = NULL WHERE state NOT IN {CLOSED} AND closed_at IS NOT NULL")
    _index("closed_at IS NULL")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE issuances SET (fillfactor = 60)")


def downgrade() -> None:
    _index(f"state NOT IN {CLOSED}")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE issuances RESET (fillfactor)")


def _index(is_open: str) -> None:
    for name, index in INDEXES.items():
        op.execute(f"DROP INDEX {name}")
        op.execute("CREATE " + index.format(name, open=is_open))
