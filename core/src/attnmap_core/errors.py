"""The one exception that means "your input is wrong", as opposed to a bug of this library."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in what the user gave: a file, a folder, an option.

    The message is one line that names the file or value, says what was expected and what was found,
    and what to do about it. Command lines print it and exit with code 2; nothing is left half-written.

    Example:
        >>> raise InputError("photos/a.jpg: 0 bytes, expected an image; delete it or pass --skip-unreadable")
        Traceback (most recent call last):
        attnmap_core.errors.InputError: photos/a.jpg: 0 bytes, expected an image; delete it or pass --skip-unreadable
    """
