"""A run's configuration as its result file holds it: without secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from evolvenet.report.facts import MASK, SECRET, is_secret_flag, without_secret, without_user


def recorded_config(config: DictConfig, published: bool = False) -> Any:
    """The configuration as plain data, its interpolations resolved, but for those of environment variables.

    Variables of the environment stay as they are written, `${oc.env:WANDB_API_KEY}`: they hold secrets and paths of one machine.
    Texts under names like `api_key`, `token`, `password` or `secret` are masked, unless they are such a variable; so
    are those behind a flag of such a name, in a list or in one text.

    Args:
        config: of a run.
        published: whether it is for a page or a logger: users and passwords of URLs are masked too, and the home and the working
            directory written as `~` and `.`. Two runs are compared by what is not changed so.

    >>> config = OmegaConf.create({"seed": 1, "same": "${seed}", "logger": {"api_key": "abc", "dir": "${oc.env:HOME}"}})
    >>> recorded_config(config)
    {'seed': 1, 'same': 1, 'logger': {'api_key': '***', 'dir': '${oc.env:HOME}'}}
    """
    try:
        with _environment_unread():
            plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:  # an interpolation that computes with a variable's value
        plain = OmegaConf.to_container(config, resolve=False)
    return _masked(plain, without_user if published else str)


@contextmanager
def _environment_unread() -> Iterator[None]:
    """In the body, an interpolation of an environment variable gives its own text."""

    def as_written(*arguments: Any) -> str:
        return f"${{oc.env:{','.join('null' if each is None else str(each) for each in arguments)}}}"

    OmegaConf.register_new_resolver("oc.env", as_written, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _masked(plain: Any, text: Callable[[str], str], secret: bool = False) -> Any:
    if isinstance(plain, dict):
        return {key: _masked(value, text, secret or bool(SECRET.search(str(key)))) for key, value in plain.items()}
    if isinstance(plain, list):
        befores = zip([None, *plain], plain, strict=False)
        return [_masked(own, text, secret or is_secret_flag(before)) for before, own in befores]
    if not isinstance(plain, str):
        return plain
    if secret and not plain.startswith("${oc.env:"):
        return MASK
    return text(without_secret(plain) if re.search(r"(?<![\w-])-", plain) else plain)
