"""What the two sides of the queue must agree on: bytes, keys, errors, what a model's files mean."""
