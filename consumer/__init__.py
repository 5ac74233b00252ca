"""The device tier: reads jobs, forms micro-batches, embeds and publishes."""
