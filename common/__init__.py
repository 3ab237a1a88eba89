"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user can mend: one sentence that names the flag or the file. Scripts print it and exit with 2."""
