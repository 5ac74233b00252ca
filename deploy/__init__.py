"""The `embedstream` command and the ways to start the parts together."""
