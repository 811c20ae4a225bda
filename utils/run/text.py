"""Text for messages and records: one short printable line, without passwords."""

import re

HIDDEN = "***"


def shown(text: str) -> str:
    """A path, URL or command, or text with these, without passwords: the parts of a URL before @ and after ? are hidden.

    Of a pipe: command, also the values of flags and headers that are called password, token, secret or key.
    """
    text = re.sub(r"(?<=://)[^/\s?#'\"]*@", f"{HIDDEN}@", text)
    text = re.sub(r"(://[^\s?#'\"]*[?#])[^\s'\"]+", rf"\1{HIDDEN}", text)
    if "pipe:" in text:
        named = r"(?:bearer|basic)\s+|[\w-]*(?:token|passw(?:or)?d|secret|key)[\w-]*['\"]?[=:\s]\s*['\"]?"
        text = re.sub(rf"(?i)({named})[^\s'\"&]+", rf"\1{HIDDEN}", text)
        text = re.sub(r"(\s(?:-u|--user)[\s=]\s*['\"]?)[^\s'\"]+", rf"\1{HIDDEN}", text)
    return text


def shown_flags(flags: dict) -> dict:
    """Flags as files may keep them: without passwords."""
    return {name: shown(value) if isinstance(value, str) else value for name, value in flags.items()}


def brief(text: str, most: int = 100) -> str:
    """At most `most` characters of a text that comes from a file; unprintable characters become ?."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)
