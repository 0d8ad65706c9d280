"""``fedvfm client ...``: the hospital's verbs. Thin: each calls a function of the client wing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperGroup

from fedvfm import errors
from fedvfm.cli import drafts
from fedvfm.report import quantity
from fedvfm.runtime import logs

if TYPE_CHECKING:
    from fedvfm.client import dossier, privacy_report, state_folder
    from fedvfm.client import purge as purges
    from fedvfm.config import survey as surveys
    from fedvfm.trust import locked_recipe

LOG = logging.getLogger(__name__)
NAME = "client"
app = typer.Typer(help="Take part in a federation, on your own terms.", no_args_is_help=True)
app.command("init")(drafts.site)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]
StateOption = Annotated[Path, typer.Option("--state", envvar="FEDVFM_SITE_STATE", help="This site's state folder.")]
Site = Annotated[Path | None, typer.Option("--data", help="The site's own file, for its policy.")]
StateArgument = Annotated[Path | None, typer.Argument(metavar="[STATE]", help="This site's state folder.")]
FetchWeights = Annotated[
    bool,
    typer.Option("--fetch-weights", help="Download the backbone if it is missing, in place of naming it."),
]
STATE = Path("fedvfm-site")
YES = ("y", "yes")


def _say(lines: Sequence[str]) -> None:
    """Notes go to standard error, so that standard output stays machine-readable."""
    if lines:
        print("\n".join(lines), file=sys.stderr, flush=True)


def _judge(locked: locked_recipe.LockedRecipe, site: Path | None) -> privacy_report.Judged:
    """A recipe under the policy of a site's file, where one is given."""
    from fedvfm.client import privacy_report, site_file

    return privacy_report.judge(locked, None if site is None else site_file.read_policy(site))


def _text(
    locked: locked_recipe.LockedRecipe, judged: privacy_report.Judged, here: privacy_report.Here | None = None
) -> list[str]:
    from fedvfm.client import privacy_report, recipe_review
    from fedvfm.trust import signed_documents

    own, verdicts = () if here is None else privacy_report.words(here), judged.verdicts
    lines = [f"{heading + ':':22} {sentence}" for heading, sentence in recipe_review.words(locked, own)]
    if judged.without_labels:
        lines.insert(0, f"{'this site:':22} {recipe_review.without_labels(locked.recipe)}")
    if verdicts is None:
        return [
            *lines,
            "",
            "No policy was given. The client checks the policy in SITE.toml before it computes anything.",
        ]
    lines += ["", "The policy of this site:"]
    for verdict in verdicts:
        asked, allowed = signed_documents.shown(verdict.asked), signed_documents.shown(verdict.allowed)
        lines.append(
            f"  {'accepts' if verdict.accepted else 'REFUSES':8} {verdict.rule}: asked {asked}; allowed {allowed}"
        )
    return lines


@app.command()
def join(
    invite: Annotated[Path, typer.Argument(help="The file the coordinator handed over.")],
    fingerprint: Annotated[str, typer.Option(help="What the coordinator told you by another channel.")],
    data: Site = None,
    path: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the images: once you approved, writes the site's own file (--data, or site.toml), whose "
            "policy accepts this recipe and no more."
        ),
    ] = None,
    approve: Annotated[str | None, typer.Option(help="Hash of the recipe you approve, instead of being asked.")] = None,
    fetch_weights: FetchWeights = False,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Check an invite, review its recipe, make this site's key here and write a request to send back."""
    from fedvfm.client import state_folder, weights

    invitation = state_folder.read_invite(invite, fingerprint)
    state_folder.free(state)
    judged = _judge(invitation.lock, None if path is not None else data)
    own = None if path is None else drafts.accepting(invitation.site, path, data or drafts.SITE, judged.facts)
    _say([f"invite of federation '{invitation.federation}' at {invitation.address} for site '{invitation.site}'", ""])
    _say(_text(invitation.lock, judged, judged.here))
    judged.require()
    if own is not None:
        _say([f"{own.file} will be written with this policy, which accepts this recipe and no more:", "", own.policy])
    # The site joins and starts without the weights too, but trains only once they are here.
    _say([f"note: {fault.note}" for fault in weights.faults([invitation.lock] if not fetch_weights else [])])
    approved = approve if approve is not None else _ask(invitation.lock, as_json)
    if fetch_weights and approved == invitation.lock.hash:
        _say([f"note: {fault.note}" for fault in weights.faults([invitation.lock], fetch=True)])
    with contextlib.nullcontext() if own is None or approved != invitation.lock.hash else own.written():
        joined = state_folder.join(state, invitation, approved)
    values = {
        "site": invitation.site,
        "federation": invitation.federation,
        "state": str(state),
        "request": str(joined.request),
    }
    values["key"] = joined.spoken_key
    values |= {} if own is None else {"site_file": str(own.file)}
    if as_json:
        print(json.dumps({**values, "recipe": invitation.lock.hash, "approved": True}, indent=2))
        return
    print(f"site {invitation.site}: key made in {state}\nsend this file to the coordinator: {joined.request}")
    print(
        f"key: {values['key']}\ntell it to the coordinator by telephone or in person, never in the mail with the file"
    )
    if own is not None:
        print(f"{own.file}: check the data with: fedvfm data check {own.file} --recipe {invite}")


def _ask(locked: locked_recipe.LockedRecipe, as_json: bool) -> str:
    """The hash of the recipe if the person says yes.

    Raises:
        PolicyRefused: if not; nothing was written then.
    """
    _say(["", f"Approve recipe {locked.hash}? Your login name, the time and this hash are recorded."])
    if as_json:
        raise errors.PolicyRefused("approval-pending", f"with --json nobody is asked; give --approve {locked.hash}")
    said = _answer("[y/N] ")
    if said not in YES:
        why = (
            "not approved" if said is not None else f"nobody answered; without a terminal give --approve {locked.hash}"
        )
        raise errors.PolicyRefused("approval-pending", f"{why}; nothing was written and no key was made")
    return locked.hash


def _answer(question: str) -> str | None:
    """What a person types; None where nobody can: no terminal, and nothing piped in."""
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline() if sys.stdin is not None else ""  # a parent may have closed it
    return line.strip().lower() if line else None


def _open(what: str, state: Path) -> locked_recipe.LockedRecipe:
    """A recipe by file (TOML, locked, invite) or by the hash of one seen here."""
    from fedvfm.client import state_folder
    from fedvfm.config import schema
    from fedvfm.model import locking
    from fedvfm.trust import invites, recipes

    path = Path(what)
    if not path.exists() and path.suffix not in (".json", ".toml"):
        return state_folder.open_state(state).find(what)
    content = recipes.read(path)
    if isinstance(content, schema.Recipe):
        return locking.make(content)
    if isinstance(content, invites.Invite):
        _say(["note: whom this invite is from is not checked here; 'fedvfm client join' checks it", ""])
        return content.lock
    return content


def _asked(what: str, locked: locked_recipe.LockedRecipe, state: Path) -> dossier.Asked:
    """Who asks for a recipe: as its invite says, or as this site's folder keeps it."""
    from fedvfm.client import dossier, state_folder
    from fedvfm.trust import invites, recipes

    path = Path(what)
    content = recipes.read(path) if path.exists() or path.suffix in (".json", ".toml") else None
    if isinstance(content, invites.Invite):
        about = (content.study, content.federation, content.address, content.site)
        return dossier.Asked(locked, *about, invited=content.lock.hash)
    if content is None:
        where = state_folder.open_state(state)
        own = (where.study(), where.about.federation, where.about.address, where.about.site)
        return dossier.Asked(locked, *own, checked=True, invited=where.invited())
    return dossier.Asked(locked)


@app.command()
def review(
    recipe: Annotated[
        str, typer.Argument(help="A recipe, an invite or a survey, or the hash of a recipe or survey seen here.")
    ],
    site: Annotated[Path | None, typer.Option("--policy", "--data", help="The site's own file.")] = None,
    print_policy: Annotated[
        bool, typer.Option("--print-policy", help="Print a policy that accepts this recipe and no more.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write a dossier for an ethics board to this file, to be printed.")
    ] = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Say in plain words what a recipe does, or what a survey asks, and what the site's policy says of it.

    Exits with 13 if it refuses. Of a survey --data also shows what this site would tell now; nothing is sent.
    """
    from fedvfm.client import recipe_review
    from fedvfm.client.gate import policy
    from fedvfm.trust import signed_documents

    survey = _survey(recipe, state)
    if survey is not None:
        if page is not None or print_policy:
            raise errors.ConfigError("client review", ["--html and --print-policy are of a recipe; this is a survey"])
        _review_survey(survey, site, state, as_json)
        return
    locked = _open(recipe, state)
    judged = _judge(locked, site)
    if print_policy:
        text = policy.accepting(judged.facts)
        print(json.dumps({"policy": text}, indent=2) if as_json else text, end="" if not as_json else "\n")
        return
    asked = _asked(recipe, locked, state)
    if page is not None:
        from fedvfm.client import dossier

        dossier.write(page, asked, judged)
        _say([f"dossier: {page}"])
    here, verdicts = judged.here, judged.verdicts
    study = [] if asked.study is None else asked.study.words()
    values = recipe_review.to_json(locked, verdicts, None if here is None else vars(here))
    rosters = _rosters(locked, state)
    values |= {"rosters": [text for _, text in rosters]} if rosters else {}
    values |= {"study": dict(study)} if study else {}
    values |= {"study_doubt": asked.doubt} if asked.doubt else {}
    study = [("attention", asked.doubt), *study] if asked.doubt else study
    lines = [f"{heading + ':':22} {signed_documents.shown(text)}" for heading, text in study]
    values |= {"role": recipe_review.without_labels(locked.recipe)} if judged.without_labels else {}
    lines += [*_text(locked, judged, here), *(f"{heading + ':':22} {sentence}" for heading, sentence in rosters)]
    print(json.dumps(values, indent=2) if as_json else "\n".join(lines))
    if verdicts is not None and not all(verdict.accepted for verdict in verdicts):
        raise typer.Exit(errors.PolicyRefused.exit_code)


def _survey(what: str, state: Path) -> surveys.Survey | None:
    """A survey by its TOML file, or by the hash of one that arrived; None where it is none."""
    from fedvfm.client import state_folder
    from fedvfm.config import schema
    from fedvfm.config import survey as survey_config

    path = Path(what)
    if path.suffix == ".toml" and path.is_file():
        values = schema.read_toml(path)
        return schema.parse(survey_config.Survey, values, str(path)) if "statistics" in values else None
    if path.exists() or not (state / state_folder.ABOUT).exists():
        return None
    return state_folder.open_state(state).find_survey(what)


def _review_survey(survey: surveys.Survey, site: Path | None, state: Path, as_json: bool) -> None:
    from fedvfm.client import site_file, state_folder, survey_review
    from fedvfm.client.gate import history
    from fedvfm.config import schema

    answered = 0
    if (state / state_folder.ABOUT).exists():
        log = history.History()
        state_folder.open_state(state).audit.follow(log.add)
        answered = len(set(log.surveyed) - {survey.hash})
    config = None if site is None else site_file.read_policy(site)
    refusals = survey_review.judge(survey, config)
    values = survey_review.to_json(survey, refusals, answered)
    lines = [f"{heading + ':':22} {text}" for heading, text in survey_review.words(survey, answered)]
    lines += [f"REFUSES: {text}" for text in refusals]
    if isinstance(config, schema.SiteConfig):
        statement = survey_review.tell(survey, config)
        values["would_tell"] = statement
        noisy = " before the noise" if survey.privacy is not None else ""
        lines += ["", f"As the data are now this site would tell{noisy}, in patients:"]
        lines += survey_review.told_lines(survey, statement)
    print(json.dumps(values, indent=2) if as_json else "\n".join(lines))
    if refusals:
        raise typer.Exit(errors.PolicyRefused.exit_code)


def _rosters(locked: locked_recipe.LockedRecipe, state: Path) -> list[tuple[str, str]]:
    """The roster documents that came to this site, for a recipe with secure aggregation."""
    from fedvfm.client import recipe_review, state_folder

    if locked.recipe.secure_aggregation is None or not (state / state_folder.ABOUT).exists():
        return []
    where = state_folder.open_state(state)
    return recipe_review.roster_lines(where.rosters(), where.approvals.roster_of(locked.hash), locked.recipe)


@app.command()
def approve(
    recipe: Annotated[str, typer.Argument(metavar="HASH", help="Hash of a recipe or survey seen here.")],
    data: Site = None,
    roster: Annotated[
        str, typer.Option(help="Hash of the roster document you approve beside it (secure aggregation only).")
    ] = "",
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Approve a recipe or a survey that arrived; who, when and which hash are recorded."""
    from fedvfm.client import state_folder

    where = state_folder.open_state(state)
    survey = where.find_survey(recipe)
    if survey is not None:
        _require_survey(survey, data)
        _show(state_folder.approve_survey(where, survey), as_json, "survey")
        return
    locked = where.find(recipe)
    _judge(locked, data).require()
    _show(state_folder.approve(where, locked, roster=roster.lower()), as_json)


@app.command()
def withdraw(
    recipe: Annotated[str, typer.Argument(metavar="HASH", help="Hash of an approved recipe or survey.")],
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Withdraw an approval: the client trains no more on this recipe, or answers this survey no more."""
    from fedvfm.client import state_folder

    where = state_folder.open_state(state)
    survey = where.find_survey(recipe)
    if survey is not None:
        _show(state_folder.withdraw_survey(where, survey), as_json, "survey")
        return
    _show(state_folder.withdraw(where, where.find(recipe).hash), as_json)


def _require_survey(survey: surveys.Survey, site: Path | None) -> None:
    """Check a survey against the site's file, where one is given.

    Raises:
        PolicyRefused: with the first reason.
    """
    from fedvfm.client import site_file, survey_review

    refusals = survey_review.judge(survey, None if site is None else site_file.read_policy(site))
    if refusals:
        raise errors.PolicyRefused("policy-survey", "; ".join(refusals))


def _show(line: dict[str, Any], as_json: bool, what: str = "recipe") -> None:
    if as_json:
        values = {key: line[key] for key in ("recipe", "event", "who", "time")}
        print(json.dumps({what: values.pop("recipe"), **values}, indent=2))
    else:
        print(f"{what} {line['recipe']}: {line['event']} by {line['who']} at {line['time']}")


@app.command()
def rekey(state: StateOption = STATE, as_json: Json = False) -> None:
    """Make another key for this site, to be told to the coordinator; all else stays as it is."""
    from fedvfm.client import rekeying, state_folder
    from fedvfm.trust import keys

    where = state_folder.open_state(state)
    asked, document = rekeying.begin(where), rekeying.NewKey(where).document
    values = {"site": asked.site, "federation": asked.federation, "key": keys.spoken(asked.public_key)}
    values["rekeying"] = str(document)
    if as_json:
        print(json.dumps(values, indent=2))
        return
    print(f"site {asked.site}: a new key waits in {state}\nsend this file to the coordinator: {document}")
    print(f"new key: {values['key']}")
    print("tell it to the coordinator by telephone or in person, never in the mail with the file")
    print("there: fedvfm server rekey FILE --key KEY; the client takes the new key by itself then")


@app.command()
def approvals(state: StateOption = STATE, as_json: Json = False) -> None:
    """Show the recipes seen here, and who approved or withdrew what and when."""
    from fedvfm.client import state_folder

    where = state_folder.open_state(state)
    rows, stand, seen = where.approvals.rows(), where.approvals.stand(), where.seen()
    if as_json:
        lines = [{key: row[key] for key in ("recipe", "event", "who", "time")} for row in rows]
        print(json.dumps({"site": where.about.site, "approved": stand, "seen": seen, "lines": lines}, indent=2))
        return
    for recipe in seen:
        print(f"recipe {recipe}: {'approved' if recipe in stand else 'not approved'}")
    stand = where.survey_approvals.stand()
    for survey in where.surveys_seen():
        print(f"survey {survey}: {'approved' if survey in stand else 'not approved'}")
    for row in [*rows, *where.survey_approvals.rows()]:
        print(f"{row['time']} {row['event']:9} {row['recipe'][:12]} by {row['who']}")


@app.command()
def start(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's own file.")],
    health: Annotated[str, typer.Option(help="host:port of a gRPC health probe; none by default.")] = "",
    fetch_weights: FetchWeights = False,
    page: Annotated[
        bool,
        typer.Option("--page", help="Serve a live page on this machine's loopback; its address is said at the start."),
    ] = False,
    page_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the live page; any free one by default.")
    ] = 0,
    state: StateOption = STATE,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each note as a line of JSON on standard output.")
    ] = False,
) -> None:
    """Take part until Ctrl-C: wait for messages, judge them by the policy and the approvals, and answer."""
    from fedvfm.runtime import extras
    from fedvfm.runtime import health as probe

    extras.require()  # the processes that are started need it
    from fedvfm.client import doctor, state_folder, weights
    from fedvfm.client.process import supervisor

    where = state_folder.open_state(state)
    with logs.output(as_json=as_json, stream="stdout" if as_json else "stderr"):
        for fault in weights.faults(weights.approved(where), fetch=fetch_weights):
            LOG.warning(fault.note)
        with probe.serving(health, lambda: doctor.alive(where)):
            supervisor.start(where, site, page_port=page_port if page else None)


@app.command()
def stop(state: StateOption = STATE, as_json: Json = False) -> None:
    """End the client and all its processes."""
    from fedvfm.client import state_folder
    from fedvfm.client.process import supervisor

    ran = supervisor.stop(state_folder.open_state(state))
    print(json.dumps({"stopped": ran}) if as_json else "stopped" if ran else "it did not run")


@app.command()
def status(state: StateOption = STATE, as_json: Json = False) -> None:
    """Show how far it is, what waits for a person, what your policy has left, and the last messages in words."""
    from fedvfm.client import state_folder
    from fedvfm.client import status as statuses

    now = statuses.of(state_folder.open_state(state))
    if as_json:
        print(json.dumps(now, indent=2))
        return
    print("\n".join(statuses.lines(now)))
    _show_adapters(now["adapters"])


@app.command()
def rehearse(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's own file.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe, an invite or the hash of one seen here; default is the site's."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the list as JSON to this file; must not exist.")] = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Run one real round on this site's data, send nothing, and list every byte that would leave."""
    from fedvfm.runtime import extras
    from fedvfm.storage import storage

    extras.require()
    from fedvfm.client import state_folder

    os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: nothing is fetched
    if save is not None and save.exists():
        raise errors.OutputInUse(f"{save} exists and is left as it is. Choose another --save")
    where = state_folder.open_state(state) if (state / state_folder.ABOUT).exists() else None
    from fedvfm.client import privacy_report, site_file

    here = site_file.read_site(site, None if where is None else where.about.site)
    locked = _open(recipe or here.recipe or _approved(site, where), state)
    from fedvfm.client import dry_run

    judged = privacy_report.judge(locked, here, examined=locked.holds_adapter)
    if not all(verdict.accepted for verdict in judged.verdicts or ()):
        _say(_text(locked, judged))
    rehearsal = dry_run.run(here, locked, judged, where)
    text = json.dumps(rehearsal.to_json(), indent=2)
    if save is not None:
        storage.write_text(save, text + "\n")
    print(text if as_json else "\n".join(dry_run.lines(rehearsal)))


def _approved(site: Path, where: state_folder.State | None) -> str:
    """The one recipe that is approved here, where the site's file names none."""
    stand = [] if where is None else where.approvals.stand()
    if len(stand) != 1:
        known = ", ".join(recipe[:12] for recipe in stand) or "none"
        raise errors.ConfigError("--recipe", [f"which recipe? {site} names none, and approved here are: {known}"])
    return stand[0]


class _Adapters(TyperGroup):
    """A group whose state folder may be named without ``--state``, as before it had commands of its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = bool(args) and not args[0].startswith("-") and args[0] not in self.commands
        return super().parse_args(ctx, ["--state", *args] if named else args)


adapters = typer.Typer(cls=_Adapters, invoke_without_command=True)
app.add_typer(adapters, name="adapter")


@adapters.callback()
def adapter(
    context: typer.Context,
    accept: Annotated[str | None, typer.Option(help="Accept the one that waits, by its fingerprint.")] = None,
    decline: Annotated[str | None, typer.Option(help="Decline it: it is removed.")] = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Show the final adapters that came, where they lie and what was decided; or decide of one that waits."""
    from fedvfm.client import state_folder
    from fedvfm.client.adoption import decisions
    from fedvfm.client.personal import statement

    if context.invoked_subcommand is not None:
        return
    where = state_folder.open_state(state)
    if accept is not None and decline is not None:
        raise errors.ConfigError("--accept, --decline", ["give one of the two"])
    chosen = accept or decline
    if chosen is not None:
        decisions.decide(where, chosen, accept is not None)
    rows, damaged = decisions.to_json(where), decisions.damaged(where)
    own = statement.to_json(where)
    if as_json:
        print(json.dumps({"site": where.about.site, "adapters": rows, "damaged": damaged, "personal": own}, indent=2))
        return
    print(f"site {where.about.site}: {quantity.of(len(rows), 'final adapter')} received")
    _show_adapters(rows)
    for text in damaged:
        print(f"damaged: {text}")
    for row in own:
        word = f", joining: {row['word']}" if row["word"] else ""
        print(f"personal adapter of {row['fingerprint'][:12]}: {row['choice']}{word}\n  {row['folder']}")


@adapters.command("personal")
def adapter_personal(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's own file.")],
    adapter: Annotated[
        str | None, typer.Option(help="Fingerprint of the final adapter; default is the newest that was accepted.")
    ] = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Train on from the final adapter at this site alone, choose by validation patients, and sign what it gained."""
    from fedvfm.runtime import extras

    extras.require()
    from fedvfm.client import site_file, state_folder
    from fedvfm.client.personal import personalisation, statement

    where = state_folder.open_state(state)
    kept = personalisation.run(where, site_file.read_site(site, where.about.site), adapter)
    if as_json:
        print(json.dumps({**kept.statement.model_dump(mode="json"), "folder": str(kept.folder)}, indent=2))
        return
    print("\n".join([*statement.lines(kept.statement), f"adapter and signed statement: {kept.folder}"]))


def _show_adapters(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        score = "not scored" if row["score"] is None else f"{row['metric']} {row['score']:.4f}"
        print(
            f"adapter {row['fingerprint'][:12]} of recipe {row['recipe'][:12]}, round {row['round']}: {row['verdict']} "
            f"({row['reason']}), {score} on {row['examples']} own test samples"
        )
        if row["folder"]:
            print(f"  {row['folder']}")
        if row["verdict"] == "pending":
            print(f"  a person decides: fedvfm client adapter --accept {row['fingerprint'][:12]}, or --decline")


@app.command()
def purge(
    folder: StateArgument = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    with_audit: Annotated[
        bool, typer.Option("--audit", help="The audit log too; a receipt of it is printed first, approvals end.")
    ] = False,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Remove received and personal adapters, kept replies, logs and caches; keys and audit log stay."""
    from fedvfm.client import purge as purging
    from fedvfm.client import state_folder
    from fedvfm.trust import signed_documents

    where = state_folder.open_state(folder or state)
    purging.require_stopped(where)
    rows = purging.found(where, with_audit=with_audit)
    receipt = purging.receipt(where) if with_audit else None
    if receipt is not None:
        _say(["receipt of the audit log; keep it:", signed_documents.to_text(receipt)])
    if not yes:
        _confirm(where.about.site, rows, as_json)
    gone = purging.run(where, with_audit=with_audit)
    if as_json:
        paper = None if receipt is None else receipt.model_dump(mode="json")
        print(
            json.dumps(
                {"site": where.about.site, "removed": [vars(removed) for removed in gone], "receipt": paper}, indent=2
            )
        )
        return
    for removed in gone:
        files = quantity.of(removed.files, "file")
        print(f"removed {removed.kind:10} {files:>10}, {removed.bytes:,} bytes: {removed.path}")
    print(f"kept: key, certificate, recipes, approvals{'' if with_audit else ', audit log'}; weights and your own data")


def _confirm(site: str, rows: Sequence[purges.Removed], as_json: bool) -> None:
    """Ask before anything is removed.

    Raises:
        ConfigError: if the answer is no, or nobody can be asked.
    """
    if as_json:
        raise errors.ConfigError("purge", ["with --json nobody is asked; give --yes. Nothing was removed"])
    _say(
        [
            f"to be removed at site {site}:",
            *(f"  {part.kind}: {quantity.of(part.files, 'file')}, {part.path}" for part in rows),
        ]
    )
    said = _answer("remove? [y/N] ")
    if said not in YES:
        why = "not confirmed" if said is not None else "nobody answered; without a terminal give --yes"
        raise errors.ConfigError("purge", [f"{why}; nothing was removed"])


@app.command()
def unit(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's own file.")],
    user: Annotated[str | None, typer.Option(help="Whom it runs as; default is who owns the state folder.")] = None,
    state: StateOption = STATE,
    as_json: Json = False,
) -> None:
    """Print a hardened systemd unit that runs 'fedvfm client start'."""
    from fedvfm.cli import systemd
    from fedvfm.client import site_file

    text = systemd.client(site, site_file.read_site(site), state, user).text()
    print(json.dumps({"name": "fedvfm-client.service", "unit": text}, indent=2) if as_json else text, end="")


@app.command("batch-script")
def batch_script(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's own file, with a table batch.")],
    apptainer: Annotated[Path | None, typer.Option(help="Compute in this Apptainer image.")] = None,
    require_no_network: Annotated[
        bool, typer.Option("--require-no-network", help="A node that cannot take the network away computes nothing.")
    ] = False,
    definition: Annotated[
        bool, typer.Option("--definition", help="Print the definition file of the image instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the Slurm script that batch.submit of SITE.toml names."""
    from fedvfm.client import site_file
    from fedvfm.client.batch import scripts

    own = site_file.read_site(site)
    if definition:
        name, text = scripts.DEFINITION, scripts.definition()
    else:
        name, text = scripts.SLURM, scripts.slurm(own, apptainer, require_no_network=require_no_network)
    print(json.dumps({"name": name, "script": text}, indent=2) if as_json else text, end="")
