"""Names of files, without torch."""

MANIFEST = "manifest.json"  # of a checkpoint
CONFIG = "config.yaml"  # of a release
STAMP = "checkpoint.sha256"  # in a run's own release: of the manifest of its checkpoint
