"""The one exception that users are meant to read."""


class InputError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do. The command line prints it and exits 2."""
