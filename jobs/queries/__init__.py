"""All SQL. Functions over a `Connection`; the caller owns the transaction.

Time that decides anything is Postgres' `clock_timestamp()`. Locks are taken in one order everywhere, worker row, then
job rows by id, then requests; claims skip rows that another transaction has locked.
"""
