"""How a listener answers HTTP-01 challenges, and which version a version brings back.

Revision: 0004, follows 0003.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Native ADD COLUMN on both: SQLite's batch mode would rebuild the table, children and all.
    op.execute("ALTER TABLE listeners ADD COLUMN challenge TEXT")
    op.execute("ALTER TABLE config_versions ADD COLUMN restores BIGINT")


def downgrade() -> None:
    op.execute("ALTER TABLE config_versions DROP COLUMN restores")
    op.execute("ALTER TABLE listeners DROP COLUMN challenge")
