"""What a run reports: one line an event, by one process, where the application lets it through."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import nn

from evolvenet import Evolver, Proposal
from evolvenet.engine import announcements
from evolvenet.engine.announcements import show_messages

log = logging.getLogger("evolvenet")


class Fixed:
    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def propose(self, context: object) -> dict[str, Proposal]:
        return {f"{name[1:]}": Proposal(size, "fixed") for name, size in self.sizes.items()}


@contextmanager
def bare() -> Iterator[None]:
    """Loggers as in a fresh interpreter: pytest has put handlers on the root."""
    level, root = log.level, logging.getLogger()
    with patch.object(root, "handlers", []), patch.object(log, "handlers", []):
        log.setLevel(logging.NOTSET)
        yield
        log.setLevel(level)


def evolver(**sizes: int) -> Evolver:
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
    made = Evolver(model, None, Fixed(**sizes), torch.zeros(1, 4))
    made.observe(torch.randn(200, 4))
    return made


def test_an_event_is_one_line_with_details_below_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "evolvenet"):
        evolver(_0=8, _2=8).step(at=124)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert line.startswith("step 124: 722 → 130 parameters, 2 widths, ")
    details = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert "step 124: 0 32 → 8: fixed" in details
    assert "step 124: 2 16 → 8: fixed" in details


def test_a_skipped_event_is_a_warning_alone(caplog: pytest.LogCaptureFixture) -> None:
    made = evolver(_0=8)
    made.forget()
    with caplog.at_level(logging.INFO, "evolvenet"):
        made.step(at=7)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_messages_appear_once_on_stderr_until_the_application_sets_logging_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bare():
        show_messages()
        show_messages()
        log.info("one")
        logging.getLogger().handlers.append(logging.StreamHandler())
        log.info("two")
    shown = capsys.readouterr()
    assert shown.err == "evolvenet: one\ntwo\n"
    assert shown.out == ""


def test_a_level_and_handlers_that_the_application_has_set_stay() -> None:
    with bare():
        log.setLevel(logging.WARNING)
        log.handlers.append(own := logging.NullHandler())
        show_messages()
        assert log.level == logging.WARNING
        assert log.handlers == [own]


def test_only_rank_0_reports(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Second:
        rank = 1

    event = evolver(_0=8).step(at=3)
    capsys.readouterr()
    monkeypatch.setattr(announcements, "process_group", Second)
    with bare():
        show_messages()
        announcements.announce(event)
        log.warning("from everywhere")
    assert capsys.readouterr().err == ""
