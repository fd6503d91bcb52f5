"""What gives somebody access is struck out of what is kept or logged: tokens of this server, passwords in addresses."""

import re

__all__ = ["is_harmless", "masked"]

_SECRETS = re.compile(r"(?P<token>ltr_)[\w-]+|(?P<user>://[^\s/@:]{0,100}):[^\s/@]+(?=@)")


def is_harmless(text: str) -> bool:
    """Tell whether nothing in a text could be one, as in nearly every line of a log."""
    return "ltr_" not in text and "://" not in text


def masked(text: str) -> str:
    """Return the text without them."""
    if is_harmless(text):
        return text
    return _SECRETS.sub(lambda found: f"{found['token']}***" if found["token"] else f"{found['user']}:***", text)
