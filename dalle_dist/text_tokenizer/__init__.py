"""Captions to text tokens: the protocol, the registry, and one file for each kind of tokenizer."""
