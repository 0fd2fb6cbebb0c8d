"""What proxies answer HTTP-01 challenges with by themselves.

Revision: 0006, follows 0005.
"""

from alembic import op
from sqlalchemy import BigInteger, Column, Index, MetaData, Table, Text

from certworker.store.types import UtcTime, form_checks

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

NAMING = {
    "pk": "pk_%(table_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}

_COLUMNS = [
    Column("host", Text, primary_key=True),
    Column("thumbprint", Text),
    Column("revision", BigInteger, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
]


def _table() -> Table:
    columns = [column._copy() for column in _COLUMNS]
    metadata = MetaData(naming_convention=NAMING)
    return Table("thumbprints", metadata, *columns, *form_checks(columns), Index(None, "revision"))


def upgrade() -> None:
    _table().create(op.get_bind())


def downgrade() -> None:
    op.drop_table("thumbprints")
