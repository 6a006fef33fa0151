"""Errors that a user can cause: the command line prints them as one line and exits with 2."""

# Status of the ranks of a run that made no progress any more: EX_TEMPFAIL of sysexits.h, for a job
# script to start the run again.
HUNG = 75


class UserError(Exception):
    """One line: what is wrong, where, and the fix."""


class ConfigError(UserError):
    """A config that cannot be used: unknown key, wrong type, or sizes that do not fit."""


class DataError(UserError):
    """Shards, images or captions that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or release folder that is missing, damaged, or belongs to another model."""


class OtherRankError(UserError):
    """A fault of the program on another rank, which prints its traceback itself."""
