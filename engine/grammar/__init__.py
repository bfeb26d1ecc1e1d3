"""Structured output: from a schema, a regex or a grammar to the tokens that may come next.

StructuredOutputs ──source──▶ llguidance's text ──trial, in a process of its own──▶ compiled here ──▶ Grammar
                                                                                              │ one each completion
step: logits ◀── bits of all rows at once ◀── masks ◀── Matcher ◀─────────────────────────────┘
"""
