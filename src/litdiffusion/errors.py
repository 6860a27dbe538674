"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend. The text is one line: it names the thing and the way out.

    Entry points print it without a traceback and exit with code 2. The core (``diffusion``, ``nn``) imports
    nothing of ours and raises ``ValueError`` with texts of the same kind.
    """
