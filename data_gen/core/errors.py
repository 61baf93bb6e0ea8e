"""What users are meant to read when something is wrong."""


class InputError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do. The command line prints it and exits 2."""


def explained(error: InputError | OSError) -> str:
    """One line of either: of what the system refuses, the file first."""
    if isinstance(error, InputError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
