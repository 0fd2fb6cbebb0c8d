"""The database: the only room that speaks SQL. One file per subject, the tables in `tables`."""
