# SPDX-License-Identifier: AGPL-3.0-or-later
"""The documents say what the program does: every key and default, every command and option, working examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import pytest

from replicator.cli.main import replctl
from replicator.config import Config, check, parse_lines

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def shown(default: Any) -> str:
    if default is None:
        return ""
    if isinstance(default, bool):
        return "yes" if default else "no"
    return str(default)


def test_every_key_is_documented_with_its_default_and_choices() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| ([^|]*)\|", read("docs/configuration.md"), re.MULTILINE
    )
    fields = {field.encode_name: field for field in msgspec.structs.fields(Config)}
    assert sorted(key for key, _, _ in rows) == sorted(fields)
    for key, kind, default in rows:
        field = fields[key]
        assert default.strip() == shown(field.default), key
        if all(isinstance(choice, str) for choice in get_args(field.type)) and get_args(field.type):
            assert kind.split(", ") == list(get_args(field.type)), key
        assert ("bool" in kind) == (field.type is bool), key


def all_commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from all_commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_every_command_is_documented_with_its_words_and_options() -> None:
    documented = {}
    for usage in re.findall(r"^\| `(replctl [^`]+)` \|", read("docs/commands.md"), re.MULTILINE):
        words = re.match(r"[a-z]+(?:[ -][a-z]+)*", usage)
        assert words is not None
        documented[words[0]] = (
            set(re.findall(r"--[a-z-]+", usage)),
            re.sub(r"\[[^]]*\]|--[a-z-]+ [A-Z]+", "", usage[words.end() :]).split(),
        )
    real = {}
    for path, command in all_commands(replctl, "replctl"):
        options = {
            name
            for param in command.params
            if isinstance(param, click.Option)
            for name in param.opts
        }
        arguments = [
            str(param.name).upper() for param in command.params if isinstance(param, click.Argument)
        ]
        real[path] = (options, arguments)
    assert documented == real


def test_the_readmes_configurations_are_accepted() -> None:
    examples = re.findall(r"```ini\n(.*?)```", read("README.md"), re.DOTALL)
    receiver, source = (check(parse_lines(example)) for example in examples)
    assert (receiver.is_source, source.is_source) == (False, True)
    assert receiver.dr_auth_token == source.dr_auth_token
    assert all(len(example.splitlines()) <= 10 for example in examples)


def test_the_configuration_of_a_nutanix_host_is_accepted() -> None:
    section = read("docs/operating.md").partition("## Nutanix at the source\n")[2]
    example = section.split("```")[1].strip()
    config = check(parse_lines(example))
    assert (config.source, config.is_source) == ("nutanix", True)
    assert len(example.splitlines()) <= 10


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/commands.md",
        "docs/configuration.md",
        "docs/json.md",
        "docs/operating.md",
    ],
)
def test_pages_that_are_named_are_there(name: str) -> None:
    text = read(name)
    named = set(re.findall(r"\]\(([^)#]+)\)", text)) | set(
        re.findall(r"\b(?:docs|scripts)/[a-z0-9.-]+\b", text)
    )
    assert [page for page in sorted(named) if not (ROOT / page).exists()] == []
