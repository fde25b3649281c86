"""Every row of the failure table: to import this is to register them."""

from __future__ import annotations

from tests.chaos import (
    rows_attack,
    rows_control,
    rows_crowd,
    rows_disk,
    rows_held,
    rows_move,
    rows_network,
    rows_postgres,
    rows_secrets,
    soak,
)
from tests.chaos.registry import ROWS

MODULES = (rows_attack, rows_control, rows_crowd, rows_disk, rows_held, rows_move, rows_network, rows_postgres, rows_secrets, soak)
__all__ = ["MODULES", "ROWS"]
