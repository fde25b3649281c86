"""Several CA processes on one PostgreSQL database, and what happens when any of them stops."""
