"""The tables. Migrations make them (`make check` compares the two); `jobs.queries` is the only code that uses them."""

from jobs.tables import audit, files, fleet, jobs, tenants, webhooks
from jobs.tables.schema import metadata

__all__ = ["audit", "files", "fleet", "jobs", "metadata", "tenants", "webhooks"]

#   tenants ─┬─ api_keys ── login_codes         a link that logs a page in, once
#            ├─ jobs ─┬─ requests ── bodies        one row for each line, key (job_id, line)
#            │        ├─ results                   one row for each settled line, key (job_id, seq)
#            │        ├─ line_events               claims that were lost, given back or ran alone
#            │        ├─ job_minutes, failure_groups, job_events      its progress, written as it happens
#            │        └─ events ── deliveries ─┐    each with its delivery_attempts
#            ├─ webhook_endpoints ─────────────┘
#            ├─ idempotency_keys
#            ├─ creations                     what requests made that may be sent again
#            ├─ audit                         who changed what
#            ├─ batches ── files               of results; a batch has a job once its input is valid
#            ├─ files                          contents lie in the file store, by id
#            └─ uploads ── upload_parts        files that come in parts
#   models      every model that a worker ever served
#   workers ─┬─ worker_minutes                  one row for each process life, with the lease
#            └─ worker_models                   what it serves in turn
#   wait_minutes   how long lines had waited when they were claimed
#   tenant_days, tenant_failures    lines settled in a day, and how they failed
