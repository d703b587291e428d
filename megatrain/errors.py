"""Mistakes of the user and of the world around: told in one message, without a traceback."""

MISTAKE, UNPROVED, STORAGE_FAILED, STOPPED = 2, 3, 74, 75
"""Exit codes. 74 and 75 are those of sysexits.h for an input/output error, and for what is to be tried again."""


class ExpectedError(Exception):
    """What a program tells its user in its text: what is wrong, where, and the cure.

    ``exit_code`` lets a script tell what another start would meet again (2) from a disk that needs somebody (74).
    """

    exit_code = MISTAKE
