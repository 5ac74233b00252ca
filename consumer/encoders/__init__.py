"""Encoders: the ways in which a batch of token ids becomes hidden states on a device.

Each takes ids and lengths of sequences that follow one another, and gives their hidden states in the same order,
without padding. They differ in speed and in the models they are right for; `choice` finds the one for a model.
"""
