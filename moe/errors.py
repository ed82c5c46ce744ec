"""The one exception that a command turns into a line on the screen and exit status 2."""


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line that names the place and the remedy."""
