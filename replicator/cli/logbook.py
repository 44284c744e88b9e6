# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl log`: the log itself, on either side: is it what it was, can it be proven, how is it kept for years.

What only reads opens the log beside whoever writes it. `seal`, `import` and `accept` change it: a receiver that runs does so
on request; otherwise this command does it, alone in the state directory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import trio

from replicator.cli.context import CliContext
from replicator.cli.control import ControlClient
from replicator.cli.progress import counting
from replicator.cli.text import one_line, size
from replicator.config import Config
from replicator.errors import RefusedError, UsageError
from replicator.log import EventLog, actions, open_log, proofs
from replicator.log.heads import load_key
from replicator.log.store import LogStore
from replicator.state_dir import check_directory, open_state_dir

#: The largest proof that is read: a record of 16 MiB in base64, and its path.
_PROOF_BYTES_MAX = 32 << 20


@click.group(no_args_is_help=False)
def log() -> None:
    """The event log: verify, prove, seal, export."""


@log.command()
@click.pass_obj
def verify(context: CliContext) -> None:
    """Check every record against the log's tree, and the tree against the heads that the other side has signed."""
    report = counting("log verify", "events")
    checked = _read(context, lambda store: proofs.verify(store, report))
    if context.json:
        context.print_json(
            {
                "events": checked.events,
                "read": checked.read,
                "root": checked.root.hex(),
                "segments": checked.segments,
                "away": checked.away,
                "signed_heads": checked.signed_heads,
            }
        )
        return
    heads = {0: "no head signed by the other side yet", 1: "1 head signed by the other side"}
    signed = heads.get(checked.signed_heads, f"{checked.signed_heads} heads signed by other sides")
    click.echo(
        f"{_count(checked)} are what they were, root {checked.root.hex()};"
        f" {len(checked.segments)} sealed, {signed}"
    )
    for name in checked.away:
        click.echo(f"{name} is not here: its events were not looked at")


def _count(checked: proofs.Checked) -> str:
    if checked.read == checked.events:
        return f"{checked.events} events"
    return f"{checked.read} of {checked.events} events"


@log.command()
@click.argument("event", type=click.IntRange(min=1), required=False)
@click.option(
    "--vm", help="EVENT is the id of an event in this VM's history; else its number in the log."
)
@click.option(
    "--since",
    type=click.IntRange(min=0),
    help="Prove instead that the log continues what it was with so many events.",
)
@click.option("--to", type=click.IntRange(min=0), help="With --since: up to so many; else all.")
@click.pass_obj
def prove(
    context: CliContext, event: int | None, vm: str | None, since: int | None, to: int | None
) -> None:
    """Print a proof that an event is in the log, or that the log only grew; `log check` verifies it anywhere."""
    if (
        (event is None) == (since is None)
        or (since is not None and vm is not None)
        or (to is not None and since is None)
    ):
        raise UsageError("give an EVENT (and perhaps --vm), or --since (and perhaps --to)")

    def make(store: LogStore) -> dict[str, Any]:
        key = load_key(store.folder)
        if since is not None:
            return proofs.prove_growth(store, key, since, to)
        assert event is not None
        number = event if vm is None else actions.number_of(store, vm, event)
        return proofs.prove_event(store, key, number)

    context.print_json(_read(context, make))


@log.command()
@click.pass_obj
def head(context: CliContext) -> None:
    """Show the log's key and its signed head, to be kept elsewhere, and what is known of the other side's."""
    found = _read(context, lambda store: proofs.show_heads(store, load_key(store.folder)))
    if context.json:
        context.print_json(found)
        return
    click.echo(f"key of this log: {found['key']}\n\n{found['head']}", nl=False)
    for peer in found["peers"]:
        click.echo(f"\nkey of the other side's log ({one_line(peer['vm'])}): {peer['key']}")


@log.command()
@click.argument("file", type=click.File("rb"))
@click.option("--key", help="The log's key, from elsewhere than the proof.")
@click.pass_obj
def check(context: CliContext, file: Any, key: str | None) -> None:
    """Verify a proof, on any host: FILE is what `log prove` printed, - for standard input."""
    text = file.read(_PROOF_BYTES_MAX + 1)
    if len(text) > _PROOF_BYTES_MAX:
        raise UsageError("this is no proof: it is too long")
    shown = proofs.check_proof(text, key)
    if context.json:
        context.print_json({"proven": shown})
    else:
        click.echo(one_line(shown))


@log.command()
@click.pass_obj
def seal(context: CliContext) -> None:
    """Close the open period now, and seal every closed one into a segment."""
    sealed = _change(context, "/v1/log/seal", {}, actions.seal)["sealed"]
    if context.json:
        context.print_json(sealed)
        return
    for segment in sealed:
        click.echo(
            f"{segment['file']}: events {segment['first']} to {segment['last']}, {size(segment['bytes'])}"
        )
    if not sealed:
        click.echo("nothing to seal: there is no event since the last time")


@log.command()
@click.pass_obj
def segments(context: CliContext) -> None:
    """List the periods of the log, sealed and open."""
    found = _read(context, actions.list_periods)
    if context.json:
        context.print_json(found)
        return
    from replicator.cli.render import show_periods  # noqa: PLC0415 - only for a person

    show_periods(found)


@log.command("export")
@click.argument("segment")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Path(path_type=Path),
    help="The file to make; NAME.jsonl becomes JSON lines, any other the segment.",
)
@click.option(
    "--move", is_flag=True, help="Then remove the segment here; log import brings it back."
)
@click.pass_obj
def export_segment(context: CliContext, segment: str, target: Path, *, move: bool) -> None:
    """Write a sealed segment to a file, verified; SEGMENT is its name or number."""
    target = target.absolute()
    if move and target.suffix == ".jsonl":
        raise UsageError("--move keeps the sealed segment: JSON lines are for reading")
    result = _read(context, lambda store: actions.export(store, segment, target, move=move))
    if context.json:
        context.print_json(result)
    else:
        click.echo(f"events {result['first']} to {result['last']} are in {target}")


@log.command("import")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.pass_obj
def import_segment(context: CliContext, file: Path) -> None:
    """Bring a segment back that was moved away, if it is the one that this log sealed."""
    source = file.absolute()
    result = _read(context, lambda store: actions.bring_back(store, source))
    if context.json:
        context.print_json(result)
    else:
        click.echo(f"{result['file']} is back: events {result['first']} to {result['last']}")


@log.command()
@click.argument("vm")
@click.pass_obj
def accept(context: CliContext, vm: str) -> None:
    """Believe the other side's log again, from what it shows next, after it was said to be broken."""
    _change(context, "/v1/log/accept", {"vm": vm}, lambda log: actions.accept(log, vm))
    if context.json:
        context.print_json({"vm": vm, "accepted": True})
    else:
        click.echo(f"{one_line(vm)}: the other side's log is believed from what it shows next")


def _folder(config: Config) -> Path:
    folder = config.state_dir / "events"
    if not folder.is_dir():
        raise RefusedError(f"there is no log in {config.state_dir} yet")
    return folder


@contextmanager
def open_store(config: Config, *, readonly: bool) -> Iterator[LogStore]:
    """The log of this host, which others may be writing. Raises RefusedError if there is none. Blocks."""
    store = LogStore.open(_folder(config), readonly=readonly)
    try:
        yield store
    finally:
        store.close()


def _read(context: CliContext, function: Callable[[LogStore], Any]) -> Any:
    with open_store(context.config(), readonly=True) as store:
        return function(store)


def _change(
    context: CliContext,
    target: str,
    body: dict[str, Any],
    act: Callable[[EventLog], Awaitable[dict[str, Any]]],
) -> dict[str, Any]:
    """Ask the receiver that runs here, or do it in this process."""
    config = context.config()
    folder = _folder(config)
    check_directory(config.state_dir, "state_dir")
    with ExitStack() as held:
        try:
            held.enter_context(open_state_dir(config.state_dir))
        except RefusedError:
            if config.is_source or not config.control_path.exists():
                raise
        else:
            return trio.run(_act, folder, act)
    return trio.run(ControlClient(config.control_path).post, target, body)


async def _act(
    folder: Path, act: Callable[[EventLog], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    async with open_log(folder) as log:
        return await act(log)


__all__ = ["log", "open_store"]
