"""Images to image tokens and back: the protocol, the registry, one file for each kind."""
