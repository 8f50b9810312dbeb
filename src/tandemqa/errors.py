"""The one error a user should ever see, and what it tells of another library's."""


class TandemError(Exception):
    """Something the user can put right.

    The message is one sentence that names what was wrong, where (file, line, field) and what to do about it.
    The command line prints it alone and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """What an error says first, without its full stop; the name of its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
