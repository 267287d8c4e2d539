"""The only code that changes a model: block tracer, self-check, generated forward, operations."""
