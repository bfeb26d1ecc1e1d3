"""OpenAI's face of the service: files, uploads and batches over the same rows as `/v1/jobs`.

The judge of every shape is the unmodified official client. Routes translate at the edge; what is stored is ours.
"""
