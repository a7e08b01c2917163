"""What a result file says of a run's configuration holds no secret."""

import json
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from evolvenet.report.facts import recorded_command
from experiments.training.recorded_config import recorded_config


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "from-the-environment")
    return OmegaConf.create(
        {
            "seed": 3,
            "same": "${seed}",
            "name": "token of a name",
            "max_tokens": 512,
            "logger": {
                "api_key": "${oc.env:WANDB_API_KEY}",
                "again": "${logger.api_key}",
                "in": "x-${logger.api_key}-y",
            },
            "command": "python serve.py --token s3cret-4",
            "plain": {"api_key": "s3cret-1", "access_token": "s3cret-2", "db": {"Password": "s3cret-3"}},
            "secrets": {"one": "s3cret-4", "more": ["s3cret-5"]},
            "root": "${oc.env:UNSET_VARIABLE,data}",
        }
    )


def test_no_value_of_the_environment_and_no_secret_is_recorded(config):
    recorded = recorded_config(config)
    text = json.dumps(recorded)
    assert "s3cret" not in text
    assert "from-the-environment" not in text
    assert recorded["logger"]["api_key"] == "${oc.env:WANDB_API_KEY}"
    assert recorded["root"] == "${oc.env:UNSET_VARIABLE,data}"
    assert (recorded["same"], recorded["name"], recorded["max_tokens"]) == (3, "token of a name", 512)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("+logger={project: x, api_key: s3cret}", "+logger={project: x, api_key: ***}"),
        ("+l={api_key: a\\,s3cret, b: 1}", "+l={api_key: ***, b: 1}"),
        ("logger.url=https://h/x?token=s3cret", "logger.url=https://h/x?token=***"),
        ("+l=[api_key=s3cret]", "+l=[api_key=***]"),
        ("+l={wandb: dict(accessKey=s3cret, n: 1)}", "+l={wandb: dict(accessKey=***, n: 1)}"),
        ("+headers=[Authorization: Bearer s3cret]", "+headers=[Authorization: ***]"),
        ("data.max_tokens=256", "data.max_tokens=256"),
        ("+logger={api_key:s3cret,project:x}", "+logger={api_key:***,project:x}"),
        ("+a={b: {Password: 's3, c}ret', c: 1}, d: [s]}", "+a={b: {Password: ***, c: 1}, d: [s]}"),
        ('--config={"db": {"access_token": "s3\\"cr,et"}, "n": 1}', '--config={"db": {"access_token": ***}, "n": 1}'),
        ("+a={secrets: {one: s3cret, two: [s3cret]}, kept: 1}", "+a={secrets: ***, kept: 1}"),
        ("+a={secrets: {token: s3cret, two: s3cret}, kept: 1}", "+a={secrets: ***, kept: 1}"),
        ("+a={url: 'http://x/y', name: monkey}", "+a={url: 'http://x/y', name: monkey}"),
        ("+a=[{token: s3cret}, {token: s3cret}]", "+a=[{token: ***}, {token: ***}]"),
        ("+a={api_key: s3cret", "+a={api_key: ***"),
        ("args=[--api_key,s3cret]", "args=[--api_key,***]"),
        ("args=['--api-key', 's3, cret', --n, 1]", "args=['--api-key', ***, --n, 1]"),
        ("args=[--fast,--token,s3cret,--n]", "args=[--fast,--token,***,--n]"),
        ("--token s3cret", "--token ***"),
        ("args='--token s3cret --n 1'", "args='--token *** --n 1'"),
        ("args='--n 1 --token=s3cret'", "args='--n 1 --token=***"),
        ("args=[--token,--fast]", "args=[--token,--fast]"),
        ("args='--tokenizer fast --max_tokens 3'", "args='--tokenizer fast --max_tokens 3'"),
        ("args=[--token,-s3cret]", "args=[--token,***]"),
        ("args='--token -s3cret'", "args='--token ***'"),
        ("--token -s3cret --n 1", "--token *** --n 1"),
        ("--token --password s3cret", "--token --password ***"),
        ("args=['--token', '--password', 's3cret']", "args=['--token', '--password', ***]"),
        ("--token -password s3cret --n 1", "--token *** --n 1"),
        ("args='run --password a,s3cret --n 1'", "args='run --password *** --n 1'"),
        ("args='run --password a(b)s3cret' ", "args='run --password ***' "),
        ("run --password a)s3cret --n 1", "run --password *** --n 1"),
        ("run --password a:s3cret\\\\s3cret --n", "run --password *** --n"),
        ("run --password 'a s3cret' --n", "run --password *** --n"),
        ("run --password a'b s3cret' --n", "run --password *** --n"),
        ("args=['--token s3cret', '--n', 1]", "args=['--token ***', '--n', 1]"),
        ('args="sh -c \\"--token s3cret\\""', 'args="sh -c \\"--token ***"'),
        ("args=[--token,a\\,s3cret,--n]", "args=[--token,***,--n]"),
        ("args=[--token,\\'s3cret\\',--n]", "args=[--token,***,--n]"),
        ("args=[--password,a)s3cret,--n]", "args=[--password,***,--n]"),
        ("args=[--password,a(b)s3cret,--n]", "args=[--password,***,--n]"),
        ("args='--token,a,s3cret --n 1'", "args='--token,*** --n 1'"),
        ("--token s3cret=a --n 1", "--token *** --n 1"),
        ("cmd=--token\\ s3cret", "cmd=--token\\ ***"),
        ("cmd=--token\\,s3cret", "cmd=--token\\,***"),
        ("cmd=--token\n  s3cret", "cmd=--token\n  ***"),
        ("cmd=--token=s3cret", "cmd=--token=***"),
        ("run --password=a,s3cret", "run --password=***"),
        ("+a={url: 'http://h/x?token=a,s3cret', n: 1}", "+a={url: 'http://h/x?token=***', n: 1}"),
        ("run --token ${oc.env:TOKEN} --n 1", "run --token ${oc.env:TOKEN} --n 1"),
        ("args=[--token,${oc.env:TOKEN},--n]", "args=[--token,${oc.env:TOKEN},--n]"),
        ("run --token ${oc.env:TOKEN},s3cret", "run --token ***"),
        ("don't --token s3cret --n 1", "don't --token *** --n 1"),
    ],
)
def test_secrets_in_a_dict_on_the_command_line_are_masked(typed, shown):
    assert shlex.split(recorded_command(["train.py", typed])) == ["train.py", shown]


def test_a_flag_behind_the_flag_of_a_secret_does_not_show_its_own_secret():
    assert shlex.split(recorded_command(["a.py", "--token", "--password", "s3cret"]))[-1] == "***"


def test_values_behind_flags_in_a_configuration_are_masked():
    config = OmegaConf.create(
        {
            "args": ["--api_key", "-s3cret", "--n", "1"],
            "line": "--token -s3,cret --n 1",
            "lines": "run\n--token s3cret",
            "kept": "a -b",
            "none": [],
        }
    )
    expected = {
        "args": ["--api_key", "***", "--n", "1"],
        "line": "--token *** --n 1",
        "lines": "run\n--token ***",
        "kept": "a -b",
        "none": [],
    }
    assert recorded_config(config) == expected


def test_folders_and_urls_name_no_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    config = OmegaConf.create(
        {"root": "/home/alice/x", "url": ["https://alice:pw@host/x"], "output": f"{Path.cwd()}/o"}
    )
    assert recorded_config(config, published=True) == {"root": "~/x", "url": ["https://***@host/x"], "output": "./o"}


def test_the_environment_is_read_again_afterwards(config):
    recorded_config(config)
    assert config.logger.api_key == "from-the-environment"


def test_what_is_computed_from_the_environment_is_recorded_as_it_is_written(monkeypatch):
    monkeypatch.setenv("WORKERS", "4")
    OmegaConf.register_new_resolver("twice", lambda x: 2 * int(x), replace=True)
    try:
        config = OmegaConf.create({"workers": "${twice:${oc.env:WORKERS}}", "token": "s3cret"})
        assert config.workers == 8
        assert recorded_config(config) == {"workers": "${twice:${oc.env:WORKERS}}", "token": "***"}
    finally:
        OmegaConf.clear_resolver("twice")
