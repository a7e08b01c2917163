"""How a run was made, for its report: command, versions, commit and machine.

Of the command, the home and the working directory are written as `~` and `.`, and passwords and tokens are masked.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SECRET = re.compile(
    r"(^|[_-]|access)keys?$|apikey|token(?!iz|s$)|passw|^pwd$|secret|credential|^auth(orization)?$", re.IGNORECASE
)
"""Names of settings whose texts are not written."""
NAME = re.compile(r"""[^\s,:\\'"{}\[\]()]*""")
"""The name of a setting, in `name=value`."""
ENTRY = re.compile(r"([\w.-]+)(?:\\?['\"])?\s*[:=]\s*")
"""The name of an entry on a command line: in a dict, Hydra's `{a: 1, b: 2}` or JSON, in a list, or in a URL's `?a=1`."""
FLAG = re.compile(
    r"""(?<![\w-])--?([A-Za-z][\w.-]*)(?:\\?['"])?(?P<between>\s*\\?,\s*|(?:\\?\s)+)(?=\S)(?!['"]?--|\\\s)"""
)
"""A flag with its value behind it, in a list, `[--token, abc]`, or in one text, `'--token abc'`. It may begin with one `-`."""
SIGN = re.compile(r"""\\.|[,'"{}\[\]()]""", re.DOTALL)
"""What decides where a value ends; an escaped sign, of two characters, does not."""
CLOSERS = {"{": "}", "[": "]", "(": ")"}
VARIABLE = re.compile(r"\$\{oc\.env:\w+\}")
"""A value that is read from the environment: its name is no secret."""
MASK = "***"
USER = re.compile(r"(?<=://)[^/@\s]+(?=@)")
"""User and password of a URL."""
PACKAGES = ("evolvenet", "torch", "lightning", "pytorch-lightning", "transformers", "timm", "numpy")
"""Packages whose versions are named, where they are imported."""


def run_facts() -> dict[str, str]:
    """What is known of this process: {what: text}."""
    commit = _commit()
    return {
        "command": recorded_command([_program(sys.argv[0]), *sys.argv[1:]]),
        **({"commit": commit} if commit else {}),
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
        "machine": _machine(),
    }


def recorded_command(arguments: Sequence[str]) -> str:
    """A command line without secrets, as it is typed in a shell.

    >>> recorded_command(["train.py", "+logger.api_key=abc", "--hub-token", "xyz", "seed=1"])
    "train.py '+logger.api_key=***' --hub-token '***' seed=1"
    >>> recorded_command(["train.py", "+logger={project: x, api_key: abc, offline: true}"])
    "train.py '+logger={project: x, api_key: ***, offline: true}'"
    """
    shown: list[str] = []
    for before, argument in zip([None, *arguments], arguments, strict=False):
        shown.append(MASK if is_secret_flag(before) else without_secret(without_user(argument)))
    return shlex.join(shown)


def is_secret_flag(text: Any) -> bool:
    """Whether the value of a secret follows on a text, as on `--token`.

    >>> is_secret_flag("--hub.token"), is_secret_flag("--token=abc"), is_secret_flag("token")
    (True, False, False)
    """
    return isinstance(text, str) and bool(re.fullmatch(r"--?[\w.-]+", text) and SECRET.search(text.rpartition(".")[2]))


def without_secret(text: str) -> str:
    """A setting, `name=value`, with its value masked if the name is that of a secret; in a dict, the values of such entries.

    The same for flags with their values within a list or a text. In doubt, more than the value is masked.

    >>> without_secret("+logger.api_key=abc"), without_secret("+logger={api_key: abc, tags: [a, b]}"), without_secret("seed=1")
    ('+logger.api_key=***', '+logger={api_key: ***, tags: [a, b]}', 'seed=1')
    >>> without_secret("args=[--token,abc,--fast]"), without_secret("--token -a,b --fast")
    ('args=[--token,***,--fast]', '--token *** --fast')
    """
    name, equals, _ = text.partition("=")
    if equals and NAME.fullmatch(name) and SECRET.search(name.rpartition(".")[2]):
        return f"{name}={MASK}"
    shown, at = "", 0
    found = [*ENTRY.finditer(text), *FLAG.finditer(text)]
    for entry in sorted(found, key=re.Match.start):
        if not SECRET.search(entry[1].rpartition(".")[2]):
            continue
        end = _end_of_secret(entry)
        if entry.re is FLAG and VARIABLE.fullmatch(text, entry.end(), end):
            continue
        if entry.start() >= at:
            shown += text[at : entry.end()] + MASK
        # a flag that was taken for a value, `--token -password abc`, has its own value masked with it
        at = max(at, end)
    return shown + text[at:]


def _end_of_secret(entry: re.Match[str]) -> int:
    """Where the value behind a name ends: commas and brackets end it in a list or dict alone, and are part of it elsewhere."""
    text, at = entry.string, entry.end()
    quote, closer = _around(text, at)
    if entry.re is FLAG and "," not in entry["between"]:
        return _end_of_word(text, at, quote)
    if closer and not quote:
        return _end_of_value(text, at, closer)
    if entry.re is FLAG:
        return max(_end_of_word(text, at, quote), _end_of_value(text, at, closer))
    if quote:
        ends = (sign.start() for sign in SIGN.finditer(text, at) if sign[0] == quote)
        return max(next(ends, len(text)), _end_of_value(text, at, closer))
    return len(text)


def _around(text: str, at: int) -> tuple[str, str]:
    """The quote that is open at a place, and what closes the innermost bracket that is open there; empty without one."""
    quote, closers = "", [""]
    for sign in SIGN.finditer(text, 0, at):
        if quote:
            quote = "" if sign[0] == quote else quote
        elif sign[0] in ("'", '"'):
            apostrophe = text[sign.start() - 1 : sign.start()].isalnum()  # as in "don't"
            quote = "" if apostrophe else sign[0]
        elif sign[0] in CLOSERS:
            closers.append(CLOSERS[sign[0]])
        elif sign[0] == closers[-1]:
            closers.pop()
    return quote, closers[-1]


def _end_of_word(text: str, at: int, quote: str) -> int:
    """Where a word of a command ends: at white space outside of quotes, or with the quote around the command."""
    around = rf"(?!{quote}(?:[\s,;:\])}}]|$))" if quote else ""
    quoted = "|".join(rf"{own}(?:\\.|[^{own}\\])*{own}" for own in "'\"" if own != quote)
    word = re.compile(rf"(?:{around}(?:\\.|{quoted}|\S))*", re.DOTALL).match(text, at)
    return at if word is None else word.end()


def _end_of_value(text: str, at: int, closer: str) -> int:
    """Where a value in a list or dict ends: at the next comma that is not within it, or at what closes the list."""
    quote, closers = "", [closer]
    for sign in SIGN.finditer(text, at):
        if quote:
            quote = "" if sign[0] == quote else quote
        elif sign[0] in ("'", '"'):
            quote = sign[0]
        elif sign[0] in CLOSERS:
            closers.append(CLOSERS[sign[0]])
        elif len(closers) == 1 and sign[0] in (",", closer):
            return sign.start()
        elif sign[0] == closers[-1]:
            closers.pop()
    return len(text)


def without_user(text: str) -> str:
    """A text with the home and the working directory as `~` and `.`, and URLs without user and password.

    >>> without_user("https://me:pass@host/x"), without_user(f"data.root={Path.cwd()}/data")
    ('https://***@host/x', 'data.root=./data')
    """
    shown = USER.sub(MASK, text)
    places = [(Path.cwd(), ".")]
    with contextlib.suppress(RuntimeError):  # a process without a home
        places.append((Path.home(), "~"))
    for folder, short in places:
        if folder != Path(folder.anchor):
            shown = re.sub(rf"(?:(?<![\w./~-])|(?<=://)){re.escape(str(folder))}(?![\w.-])", short, shown)
    return shown


def _program(path: str) -> str:
    """A script relative to the working directory, or its name alone: no folder of this machine."""
    whole = Path(path).resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else whole.name


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        if name.replace("-", "_") in sys.modules:
            try:
                found.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:  # run from its folder, without being installed
                continue
    return found


def _commit() -> str | None:
    """The commit of the working directory, and whether files differ from it; None outside of a repository."""
    git = ["git", "-C", str(Path.cwd())]
    try:
        run = [
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0] + (" with changes" if run[1] else "")


def _machine() -> str:
    parts = [_processor(), f"{os.cpu_count()} cores, {torch.get_num_threads()} threads", platform.system()]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows does not tell
        parts.insert(2, f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    if torch.cuda.is_available():
        parts.append(", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())))
    return ", ".join(filter(None, parts))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
