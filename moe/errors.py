"""The one exception that a command turns into a line on the screen and exit status 2."""


class UserError(Exception):
    """Something the user gave cannot be used; each line of the message names the place and the remedy."""
