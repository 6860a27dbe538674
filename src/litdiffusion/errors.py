"""Errors that the user can mend, and the text of those that other libraries raise."""


class UserError(Exception):
    """Something the user can mend. The text is one line: it names the thing and the way out.

    Entry points print it without a traceback and exit with code 2. The core (``diffusion``, ``nn``) imports
    nothing of ours and raises ``ValueError`` with texts of the same kind.
    """


def short_text(error: object) -> str:
    """Return the text of another library's error on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
