"""``fedvfm server ...``: the coordinator's verbs. Thin: each calls one function of the server wing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvfm import errors
from fedvfm.cli import drafts, steering
from fedvfm.cli import survey as survey_verb

if TYPE_CHECKING:
    from fedvfm.config import survey as surveys
    from fedvfm.server import state_folder

NAME = "server"
app = typer.Typer(help="Launch a federation, steer it and decide who may take part.", no_args_is_help=True)
app.add_typer(steering.app)
app.command("init-config")(drafts.server)
app.command("init-survey")(drafts.survey)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]
StateOption = Annotated[Path, typer.Option("--state", envvar="FEDVFM_SERVER_STATE", help="The server's state folder.")]
Page = Annotated[
    bool, typer.Option("--page", help="Serve a live page on this machine's loopback; its address is said at the start.")
]
PagePort = Annotated[int, typer.Option(min=0, max=65535, help="Port of the live page; any free one by default.")]
Days = Annotated[int, typer.Option(help="Days that an invite is good.")]
STATE = Path("fedvfm-server")


def _print(values: dict[str, Any], lines: list[str], as_json: bool) -> None:
    print(json.dumps(values, indent=2) if as_json else "\n".join(lines))


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(help="A recipe's TOML file, or one locked before (.json).")],
    name: Annotated[str, typer.Option(help="The federation's name.")],
    address: Annotated[str, typer.Option(help="host:port that sites connect to.")],
    sites: Annotated[str, typer.Option(help="Names of the sites to invite: north,south.")],
    san: Annotated[list[str] | None, typer.Option(help="A further host name or address. Repeatable.")] = None,
    days: Days = 30,
    study: Annotated[
        Path | None,
        typer.Option(help="TOML: purpose, contact, retention, hospitals, licence; goes into every invite."),
    ] = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Make keys, certificates and one invite a site; print the fingerprint to tell them by another channel."""
    from fedvfm.config import schema
    from fedvfm.model import locking
    from fedvfm.server import state_folder
    from fedvfm.trust import study as studies

    names = tuple(drafts.names_of(sites))
    about = None if study is None else schema.parse(studies.Study, schema.read_toml(study), str(study))
    plan = state_folder.Plan(name, address, tuple(san or ()), names, days, about)
    plan.check()
    locked = locking.open_recipe(recipe)
    created = state_folder.init(state, plan, locked)
    values = state_folder.summary(created) | {"invites": {site: str(created.invite_path(site)) for site in names}}
    lines = [
        f"federation {name} at {address}, state in {state}",
        f"recipe {created.about.recipe}",
        "",
        f"fingerprint: {values['fingerprint']}",
        "Tell it to every site by telephone or in person, never in the mail that carries the invite.",
        "",
        "Hand each site its invite (it holds a secret, good once):",
        *(f"  {site}: {path}" for site, path in values["invites"].items()),
        "There: fedvfm client join INVITE --fingerprint FINGERPRINT; then here: server approve REQUEST --key KEY",
    ]
    _print(values, lines, as_json)


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="Name of the site.")],
    days: Days = 30,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Invite a further site, or one anew: an open invite it has becomes void."""
    from fedvfm.server import state_folder

    where = state_folder.open_state(state)
    path = state_folder.invite(where, site, days)
    values = {"site": site, "invite": str(path), "fingerprint": where.fingerprint()}
    _print(values, [f"invite of {site}: {path}", f"fingerprint: {values['fingerprint']}"], as_json)


def _require_key_or_unchecked(verb: str, key: str, unchecked: bool, printed_by: str) -> None:
    if bool(key) == unchecked:
        why = (
            f"give --key ABCD-... as the site's people told you by telephone ('client {printed_by}' prints it), or "
            "--unchecked"
        )
        raise errors.ConfigError(f"server {verb}", [why])


@app.command()
def approve(
    request: Annotated[Path, typer.Argument(help="The file a site sent back.")],
    key: Annotated[
        str, typer.Option(help="The key's fingerprint, ABCD-..., as the site's people told you by another channel.")
    ] = "",
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Enrol whoever had the invite; the audit log says so.")
    ] = False,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Check a site's request against the key you were told, and put that on the roster."""
    from fedvfm.server import state_folder
    from fedvfm.trust import keys, locked_recipe

    _require_key_or_unchecked("approve", key, unchecked, "join")
    where = state_folder.open_state(state)
    entry, current = state_folder.approve(where, request, None if unchecked else key)
    lines = [f"site {entry.site} is on the roster, key {keys.spoken(entry.public_key)}"]
    if not current:
        lines.append(
            f"note: it approved recipe {entry.recipe[:12]}; {where.about.recipe[:12]} runs and needs its approval"
        )
    if entry.version != locked_recipe.version():
        lines.append(
            f"note: it has fedvfm {entry.version}, here is {locked_recipe.version()}; install the same at both ends"
        )
    _print(entry.to_json() | {"approved_current_recipe": current}, lines, as_json)


@app.command()
def rekey(
    asked: Annotated[Path, typer.Argument(help="The file that 'fedvfm client rekey' wrote at the site.")],
    key: Annotated[
        str, typer.Option(help="The new key's fingerprint, ABCD-..., as the site's people told you by another channel.")
    ] = "",
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Take it by the old key's signature alone; the audit log says so.")
    ] = False,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Give a site another key; the one it has is let in no more, all else of the site stays."""
    from fedvfm.server import state_folder
    from fedvfm.trust import keys

    _require_key_or_unchecked("rekey", key, unchecked, "rekey")
    entry = state_folder.rekey(state_folder.open_state(state), asked, None if unchecked else key)
    _print(entry.to_json(), [f"site {entry.site} has another key now, {keys.spoken(entry.public_key)}"], as_json)


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="Name of the site.")],
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Take a site off the roster; its key never comes back, the others go on."""
    from fedvfm.server import state_folder

    entry = state_folder.revoke(state_folder.open_state(state), site)
    _print(entry.to_json(), [f"site {site} is revoked since {entry.since}"], as_json)


@app.command()
def roster(state: StateOption = STATE, as_json: Json = False) -> None:
    """Show who was invited, approved and revoked."""
    from fedvfm.server import state_folder

    summary = state_folder.summary(state_folder.open_state(state))
    lines = [
        f"federation {summary['federation']} at {summary['address']}, recipe {summary['recipe'][:12]}",
        f"fingerprint: {summary['fingerprint']}",
        *(
            f"{row['site']:24} {row['status']:9} {row['since']}  key {row['key'][:16] or '-'}"
            for row in summary["sites"]
        ),
    ]
    _print(summary, lines, as_json)


@app.command("publish-roster")
def publish_roster(state: StateOption = STATE, as_json: Json = False) -> None:
    """Sign the roster document of secure aggregation: the sites approved now. Each site approves its hash."""
    from fedvfm.server import state_folder

    document = state_folder.publish_roster(state_folder.open_state(state))
    spoken = {row.site: row.spoken_key for row in document.sites}
    values = {"roster": document.hash, "created": document.created, "sites": spoken}
    lines = [
        f"roster {document.hash}",
        *(f"  {row.site:24} {row.spoken_key}" for row in document.sites),
        "Every site that takes part is asked for this document. There: fedvfm client approve RECIPE --roster HASH,",
        "once its people know, from the people of the other sites, that these are their keys.",
    ]
    _print(values, lines, as_json)


@app.command()
def survey(
    asked: Annotated[
        Path | None, typer.Argument(metavar="[SURVEY.toml]", help="What the approved sites are asked for from now on.")
    ] = None,
    chosen: Annotated[
        str, typer.Option("--of", metavar="HASH", help="Which survey; may be left out where there is one.")
    ] = "",
    close: Annotated[bool, typer.Option("--close", help="Ask nobody any more; answers stay.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder: what was answered so far, merged, and a recipe.")
    ] = None,
    backbone: Annotated[
        str, typer.Option(help="Of the proposed recipe: a name of the table, a Hugging Face name or a folder.")
    ] = "dinov2-small-imgfocus",
    largest: survey_verb.Largest = survey_verb.LARGEST,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Ask the approved sites for statistics before training; show who answered; merge, and propose a recipe.

    Each site answers once its people approved that survey. A running server asks, also while it is paused.
    """
    from fedvfm.config import schema
    from fedvfm.config import survey as survey_config
    from fedvfm.server import state_folder, surveys

    where = state_folder.open_state(state)
    if asked is not None:
        if close or output is not None or chosen:
            raise errors.ConfigError("server survey", ["with SURVEY.toml nothing else; see --help"])
        document = schema.parse(survey_config.Survey, schema.read_toml(asked), str(asked))
        surveys.publish(where, document)
        lines = [
            f"survey {document.hash}",
            "every approved site that is connected is asked; there, its people:",
            f"  fedvfm client review {document.hash[:12]} --data SITE.toml",
            f"  fedvfm client approve {document.hash[:12]}",
            "who has answered: fedvfm server survey; the result: fedvfm server survey --output FOLDER",
        ]
        _print({"survey": document.hash}, lines, as_json)
        return
    if close:
        document = surveys.find(where, chosen)
        surveys.close(where, document)
        _print({"closed": document.hash}, [f"survey {document.hash[:12]}: nobody is asked any more"], as_json)
        return
    if output is not None:
        _survey_result(where, surveys.find(where, chosen), output, backbone, largest, as_json)
        return
    rows = surveys.standing(where)
    _print({"surveys": rows}, _survey_lines(rows), as_json)


def _survey_lines(rows: dict[str, Any]) -> list[str]:
    from fedvfm.server import site_words

    lines = [] if rows else ["no survey was published; fedvfm server init-survey writes one to edit"]
    for key, row in rows.items():
        lines.append(site_words.survey(key, row))
        for site, word in row["waiting"].items():
            remedy = site_words.remedy(word, site, key)
            lines.append(f"  {site} {site_words.survey_sentence(word)}" + (f"; {remedy}" if remedy else ""))
    return lines


def _survey_result(
    where: state_folder.State, document: surveys.Survey, output: Path, backbone: str, largest: int, as_json: bool
) -> None:
    from fedvfm.server import surveys as published
    from fedvfm.survey import answer, proposal, results

    results.require_free(output)
    answers = list(published.answers(where, document).values())
    result = answer.merged(document, answers)
    proposed = proposal.of_answers(document, answers, backbone, largest)
    files = results.write(output, result, proposed, backbone)
    values = {"survey": document.hash, "sites": result.sites, "proposed": proposed.values}
    lines = survey_verb.lines(result.sites, proposed.values, files)
    _print({**values, "files": [str(path) for path in files]}, lines, as_json)


@app.command()
def certify(
    san: Annotated[list[str] | None, typer.Option(help="A further host name or address. Repeatable.")] = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Make a new server key and certificate, before the old one expires or for further names."""
    from fedvfm.server import state_folder

    names = state_folder.recertify(state_folder.open_state(state), san or [])
    _print({"names": names}, [f"new server certificate for {', '.join(names)}; restart the server"], as_json)


@app.command()
def start(
    config: Annotated[Path | None, typer.Option("--config", help="TOML with quorum, cohort and deadlines.")] = None,
    listen: Annotated[str, typer.Option(help="host:port to listen at, if not that of the address.")] = "",
    health: Annotated[str, typer.Option(help="host:port of a gRPC health probe; none by default.")] = "",
    without: Annotated[str, typer.Option(help="Sites that the first round does not wait for: south,west.")] = "",
    stay: Annotated[
        bool, typer.Option("--stay", help="When finished, keep the sites connected and wait for a further recipe.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Run in the background; return when it listens, or with the error.")
    ] = False,
    page: Page = False,
    page_port: PagePort = 0,
    track: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard:FOLDER, mlflow:URI or wandb:PROJECT takes every round's means. Repeatable."),
    ] = None,
    track_sites: Annotated[
        bool, typer.Option("--track-sites", help="Give trackers the numbers of single sites too, under their names.")
    ] = False,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Run the federation to its end, or until Ctrl-C; start it again to go on where it stopped."""
    from fedvfm.config import schema
    from fedvfm.runtime import health as probe
    from fedvfm.server import daemon, doctor, state_folder, supervisor
    from fedvfm.server.coordinator import coordinator
    from fedvfm.tracking import targets

    trackers = targets.parse(track or [])
    server = schema.ServerConfig()
    if config is not None:
        server = schema.parse(schema.ServerConfig, schema.read_toml(config), str(config))
    where = state_folder.open_state(state)
    server = server.model_copy(update={"without": (*server.without, *drafts.names_of(without))})
    supervisor.require_known(where, server)
    if detach:
        limits = (("--config", config and config.absolute()), ("--without", without))
        options = (*limits, ("--listen", listen), ("--health", health))
        words = [word for pair in options if pair[1] for word in map(str, pair)]
        words += ["--page", "--page-port", str(page_port)] if page else []
        words += [word for target in trackers for word in ("--track", f"{target.kind}:{target.where}")]
        words += ["--track-sites"] if track_sites else []
        command = daemon.command(state, words, stay=stay)
        launched = daemon.launch(state / coordinator.RUN, command)
        line = (
            f"listening at {launched['address']}, process {launched['pid']}"
            if not launched["finished"]
            else "nothing to do"
        )
        lines = [f"{line}, log {launched['log']}"]
        if page and not launched["finished"]:
            from fedvfm.runtime import page_server

            folder = state / coordinator.RUN
            lines.append(page_server.introduce(folder, page_server.read_address(folder)))
        _print(launched, lines, as_json)
        return
    with probe.serving(health, lambda: doctor.alive(state_folder.open_state(state))):
        port = page_port if page else None
        done = supervisor.start(
            where, server, listen, stay=stay, page_port=port, trackers=trackers, track_sites=track_sites
        )
        if done is None:
            print("stopped; go on with: fedvfm server start", file=sys.stderr)
            return
        values = {"round": done["round"], "fingerprint": done["fingerprint"], "sites": done["last"]["sites"]}
        _print(values, [f"finished after round {done['round']}, adapter {done['fingerprint'][:16]}"], as_json)


@app.command()
def unit(
    config: Annotated[Path | None, typer.Option("--config", help="As of server start.")] = None,
    listen: Annotated[str, typer.Option(help="As of server start.")] = "",
    user: Annotated[str | None, typer.Option(help="Whom it runs as; default is who owns the state folder.")] = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Print a hardened systemd unit that runs 'fedvfm server start'."""
    from fedvfm.cli import systemd
    from fedvfm.server import state_folder

    address = listen or state_folder.open_state(state).about.address
    options = (*(("--config", str(config.absolute())) if config else ()), *(("--listen", listen) if listen else ()))
    text = systemd.server(state, address, options, user).text()
    _print({"name": "fedvfm-server.service", "unit": text}, [text.rstrip()], as_json)


@app.command()
def stop(state: StateOption = STATE, as_json: Json = False) -> None:
    """End the server and all its processes; what was admitted is kept."""
    from fedvfm.server import state_folder, supervisor

    ran = supervisor.stop(state_folder.open_state(state))
    _print({"stopped": ran}, ["stopped" if ran else "it did not run"], as_json)


@app.command()
def status(state: StateOption = STATE, as_json: Json = False) -> None:
    """Show what runs, who takes part, how far the rounds are, and what helps where something waits."""
    from fedvfm.server import state_folder
    from fedvfm.server import status as statuses

    now = statuses.of(state_folder.open_state(state))
    _print(now, statuses.lines(now), as_json)


@app.command()
def nginx(
    upstream: Annotated[str, typer.Option(help="host:port at which 'server start --listen' listens.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for nginx.conf, certificate and key.")],
    listen: Annotated[str, typer.Option(help="port or address:port that sites reach.")] = "8443",
    resolver: Annotated[str, typer.Option(help="DNS server of a container network; Docker's is 127.0.0.11.")] = "",
    scratch: Annotated[Path, typer.Option(help="The folder nginx may write to.")] = Path("/tmp"),  # noqa: S108
    log: Annotated[str, typer.Option(help="Where refusals are written.")] = "/dev/stdout",
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Write a configuration of nginx to stand before the server; after 'certify' write it again."""
    from fedvfm.server import state_folder
    from fedvfm.server.network import nginx as fronts

    front = fronts.Front(output, listen, upstream, resolver, str(scratch), log)
    config = front.write(state_folder.open_state(state))
    _print({"nginx": str(config)}, [f"nginx -e stderr -c {config.absolute()} -g 'daemon off;'"], as_json)
