"""All SQL. Functions over a `Connection`; the caller owns the transaction.

Time that decides anything is Postgres' `clock_timestamp()`. A range of an index begins at `statement_timestamp()`,
because Postgres looks no volatile value up in an index, and would read the whole table. Locks are taken in one order
everywhere, worker row, then job rows by id, then requests; claims skip rows that another transaction has locked.
"""
