"""All SQL, by what it is for. Plain functions over a `Connection`; the caller owns the transaction.

    tenants       who asks: tenants and API keys
    submission    a job comes in: reserve, stage, publish, abandon
    reading       what owners see: jobs, results, models
    claiming      workers take requests, give them back, and learn which they lost
    settling      requests and jobs end: the writer's groups, cancel, expiry, the reaper
    workers       registration and heartbeats
    webhooks      deliveries that are due, and what came of them
    retention     what nobody waits for: uploads that were cut, old jobs, deleted rows, bells to ring again

Time that decides anything is Postgres' `clock_timestamp()`. Locks are taken in one order everywhere, worker row, then
job rows by id, then requests; claims skip what others hold.
"""
