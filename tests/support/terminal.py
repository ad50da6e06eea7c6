"""A real terminal of so many columns, as a person's screen."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def lines_on_terminal(columns: int, *words: str) -> list[str]:
    """What `kvcapsule WORDS` writes to a terminal, without its colours; it must end with 0."""
    process, screen = pty.fork()
    if process == 0:
        try:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
            environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            command = [sys.executable, "-m", "kvcapsule", *words]
            os.execve(sys.executable, command, environment | {"TERM": "xterm-256color"})
        finally:
            os._exit(127)
    written = b""
    while part := _read(screen):
        written += part
    os.close(screen)
    _, status = os.waitpid(process, 0)
    text = _CONTROL.sub("", written.decode())
    assert os.waitstatus_to_exitcode(status) == 0, text
    return text.replace("\r\n", "\n").splitlines()


def _read(screen: int) -> bytes:
    """Linux reports an error where the other side is closed."""
    try:
        return os.read(screen, 65536)
    except OSError:
        return b""
