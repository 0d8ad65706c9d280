"""``fedvfm client ...``: the hospital's verbs. Thin: each calls a function of the client wing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvfm import errors

if TYPE_CHECKING:
    from fedvfm.client import policy as policies
    from fedvfm.trust import lock as locks

NAME = "client"
app = typer.Typer(help="Take part in a federation, on your own terms.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]
StateOption = Annotated[Path, typer.Option("--state", envvar="FEDVFM_SITE_STATE", help="This site's state folder.")]
Site = Annotated[Path | None, typer.Option("--data", help="The site's own file, for its [policy].")]
STATE = Path("fedvfm-site")


def _say(lines: Sequence[str]) -> None:
    """Notes go to standard error, so that standard output stays machine-readable."""
    print("\n".join(lines), file=sys.stderr, flush=True)


def _judge(locked: locks.Lock, site: Path | None) -> list[policies.Verdict] | None:
    """The verdicts of a site's policy, or None where no file is given."""
    from fedvfm.client import policy

    return None if site is None else policy.check(policy.read(site), policy.Facts.of(locked))


def _text(locked: locks.Lock, verdicts: Sequence[policies.Verdict] | None) -> list[str]:
    from fedvfm.client import review
    from fedvfm.trust import documents

    lines = [f"{heading + ':':22} {sentence}" for heading, sentence in review.words(locked)]
    if verdicts is None:
        return [
            *lines,
            "",
            "No policy was given. The client checks the policy in SITE.toml before it computes anything.",
        ]
    lines += ["", "The policy of this site:"]
    for one in verdicts:
        asked, allowed = documents.shown(one.asked), documents.shown(one.allowed)
        lines.append(f"  {'accepts' if one.accepted else 'REFUSES':8} {one.rule}: asked {asked}; allowed {allowed}")
    return lines


@app.command()
def join(
    invite: Annotated[Path, typer.Argument(help="The file the coordinator handed over.")],
    fingerprint: Annotated[str, typer.Option(help="What the coordinator told you by another channel.")],
    data: Site = None,
    approve: Annotated[str | None, typer.Option(help="Hash of the recipe you approve, instead of being asked.")] = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Check an invite, review its recipe, make this site's key here and write a request to send back."""
    from fedvfm.client import joining

    found = joining.read_invite(invite, fingerprint)
    joining.free(state)
    verdicts = _judge(found.lock, data)
    _say([f"invite of federation '{found.federation}' at {found.address} for site '{found.site}'", ""])
    _say(_text(found.lock, verdicts))
    _refuse(found.lock, data)
    approved = approve if approve is not None else _ask(found.lock, as_json)
    made = joining.join(state, found, approved)
    told = {"site": found.site, "federation": found.federation, "state": str(state), "request": str(made.request)}
    if as_json:
        print(json.dumps({**told, "recipe": found.lock.hash, "approved": True}, indent=2))
        return
    print(f"site {found.site}: key made in {state}\nsend this file to the coordinator: {made.request}")


def _refuse(locked: locks.Lock, site: Path | None) -> None:
    from fedvfm.client import policy

    if site is not None:
        policy.require(policy.read(site), policy.Facts.of(locked))


def _ask(locked: locks.Lock, as_json: bool) -> str:
    """The hash of the recipe if the person says yes.

    Raises:
        PolicyRefused: if not; nothing was written then.
    """
    _say(["", f"Approve recipe {locked.hash}? Your login name, the time and this hash are recorded."])
    if as_json:
        raise errors.PolicyRefused("approval-pending", f"with --json nobody is asked; give --approve {locked.hash}")
    print("[y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise errors.PolicyRefused("approval-pending", "not approved; nothing was written and no key was made")
    return locked.hash


def _open(what: str, state: Path) -> locks.Lock:
    """A recipe by file (TOML, locked, invite) or by the hash of one seen here."""
    from fedvfm import locking
    from fedvfm.client import joining
    from fedvfm.trust import documents, invites
    from fedvfm.trust import lock as locks

    path = Path(what)
    if not path.exists() and path.suffix not in (".json", ".toml"):
        return joining.open_state(state).find(what)
    if path.suffix == ".toml":
        return locking.make(locking.read_toml(path))[0]
    if documents.format_of(path) == "fedvfm-invite-1":
        _say(["note: whom this invite is from is not checked here; 'fedvfm client join' checks it", ""])
        return documents.read(path, invites.Invite, "invite").lock
    return documents.read(path, locks.Lock, "locked recipe")


@app.command()
def review(
    recipe: Annotated[str, typer.Argument(help="A recipe or an invite, or the hash of a recipe seen here.")],
    site: Annotated[Path | None, typer.Option("--policy", "--data", help="The site's own file.")] = None,
    print_policy: Annotated[
        bool, typer.Option("--print-policy", help="Print a policy that accepts this recipe and no more.")
    ] = False,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Say in plain words what a recipe does, and what the site's policy says of it. Exits with 13 if it refuses."""
    from fedvfm.client import policy
    from fedvfm.client import review as reviews

    locked = _open(recipe, state)
    if print_policy:
        text = policy.accepting(policy.Facts.of(locked))
        print(json.dumps({"policy": text}, indent=2) if as_json else text, end="" if not as_json else "\n")
        return
    verdicts = _judge(locked, site)
    print(json.dumps(reviews.to_json(locked, verdicts), indent=2) if as_json else "\n".join(_text(locked, verdicts)))
    if verdicts is not None and not all(one.accepted for one in verdicts):
        raise typer.Exit(errors.PolicyRefused.exit_code)


@app.command()
def approve(
    recipe: Annotated[str, typer.Argument(metavar="HASH", help="Hash of a recipe seen here.")],
    data: Site = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Approve a recipe that arrived; who, when and which hash are recorded."""
    from fedvfm.client import joining

    where = joining.open_state(state)
    locked = where.find(recipe)
    _refuse(locked, data)
    _show(joining.approve(where, locked), as_json)


@app.command()
def withdraw(
    recipe: Annotated[str, typer.Argument(metavar="HASH", help="Hash of an approved recipe.")],
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Withdraw an approval: the client trains no more on this recipe."""
    from fedvfm.client import joining

    where = joining.open_state(state)
    _show(joining.withdraw(where, where.find(recipe).hash), as_json)


def _show(line: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({key: line[key] for key in ("recipe", "event", "who", "time")}, indent=2))
    else:
        print(f"recipe {line['recipe']}: {line['event']} by {line['who']} at {line['time']}")


@app.command()
def approvals(state: StateOption = STATE, as_json: Json = False) -> None:
    """Show the recipes seen here, and who approved or withdrew what and when."""
    from fedvfm.client import joining

    where = joining.open_state(state)
    rows, stand, seen = where.approvals.rows(), where.approvals.stand(), where.seen()
    if as_json:
        lines = [{key: row[key] for key in ("recipe", "event", "who", "time")} for row in rows]
        print(json.dumps({"site": where.about.site, "approved": stand, "seen": seen, "lines": lines}, indent=2))
        return
    for one in seen:
        print(f"recipe {one}: {'approved' if one in stand else 'not approved'}")
    for row in rows:
        print(f"{row['time']} {row['event']:9} {row['recipe'][:12]} by {row['who']}")


@app.command()
def start(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's own file.")],
    state: StateOption = STATE,
) -> None:
    """Take part until Ctrl-C: wait for messages, judge them by the policy and the approvals, and answer."""
    from fedvfm.client import joining, supervisor

    supervisor.start(joining.open_state(state), site, lambda text: _say([text]))


@app.command()
def stop(state: StateOption = STATE, as_json: Json = False) -> None:
    """End the client and all its processes."""
    from fedvfm.client import joining, supervisor

    ran = supervisor.stop(joining.open_state(state))
    print(json.dumps({"stopped": ran}) if as_json else "stopped" if ran else "it did not run")


@app.command()
def status(state: StateOption = STATE, as_json: Json = False) -> None:
    """Show what runs, what waits for approval, and what was received, decided and sent last."""
    from fedvfm.client import joining, supervisor

    found = supervisor.status(joining.open_state(state))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"site {found['site']} of federation {found['federation']} at {found['address']}")
    for name, pid in found["processes"].items():
        print(f"{name:12} {'process ' + str(pid) if pid else 'not running'}")
    for recipe in found["waiting"]:
        print(f"waits for a person: recipe {recipe}; fedvfm client review {recipe[:12]}")
    for event, fields in found["last"].items():
        print(f"{event:10} {' '.join(f'{key}={value}' for key, value in fields.items())}")
