"""Anthropic's message batches: a third translation at the edge, over the same rows as jobs. Only what its client needs.

A job is a message batch, whichever face made it: `msgbatch_…` and `job_…` are two names of one id.
"""
