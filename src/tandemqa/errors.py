"""The one error a user should ever see."""


class TandemError(Exception):
    """Something the user can put right.

    The message is one sentence that names what was wrong, where (file, line, field) and what to do about it.
    The command line prints it alone and exits with code 2.
    """
