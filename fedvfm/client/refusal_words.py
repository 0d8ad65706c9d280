"""What a site refuses with, for its people: the word that the coordinator is told, why, and what helps."""

from __future__ import annotations

_LOG = "the end of executor.log in the folder run/ of the state folder says which error it was"
_POLICY = "fedvfm client review {recipe} --policy SITE.toml shows each rule; the coordinator is told this word alone"
_MORE = "fedvfm client review {{recipe}} --policy SITE.toml says which; raise {}, or leave it at that"
WORDS: dict[str, tuple[str, str]] = {
    "adapter": ("the adapter that came does not fit this site's model", "install the release the coordinator has"),
    "adapter-missing": (
        "a difference came to an adapter that is not kept here",
        "nothing; the coordinator sends the whole adapter next",
    ),
    "approval-pending": (
        "no person here approved this recipe",
        "fedvfm client review {recipe}, then fedvfm client approve {recipe}",
    ),
    "batch": (
        "a job of the cluster ended without an answer, or did not begin in time",
        "fedvfm doctor client SITE.toml; the job's own log lies in logs/ of batch.spool",
    ),
    "codec": ("this release does not know the recipe's codec", "install the release the coordinator has"),
    "config": ("site.toml has a fault, or does not fit the recipe", "fedvfm doctor client SITE.toml names it"),
    "data": ("an image or a label cannot be used", "fedvfm data check SITE.toml names it"),
    "deadline": ("the work took longer than the round lasts", "a faster device, or ask for a longer round"),
    "device": (
        "the GPU does not compute, computes wrong numbers, or another program fills it; looked at before each round",
        f"nvidia-smi; {_LOG}. spare_devices in SITE.toml names what to use instead",
    ),
    "error": ("something broke that nobody thought of", _LOG),
    "policy-adapter": ("the policy does not accept this kind of adapter", _POLICY),
    "policy-base": (
        "an adapter came that the recipe does not begin with, or that no honest round leads to from the one before",
        "ask the coordinator; if it is honest work, raise policy.max_step",
    ),
    "policy-backbone": ("the policy does not name this backbone and its sha256", _POLICY),
    "policy-closed": ("it is outside policy.hours", "nothing; it goes on when the site is open"),
    "policy-evaluations": (
        "a score was asked for that was given already, or one more than policy.max_evaluations",
        "nothing; each adapter is scored once for each split",
    ),
    "policy-hours": ("the hours of computing are, or would be, more than policy.max_hours", _MORE.format("max_hours")),
    "policy-licence": ("the licence of the backbone's weights is not known, or is not in policy.licences", _POLICY),
    "policy-message": ("the message asks for what the recipe does not say", "ask the coordinator what it sent"),
    "policy-metrics": ("the policy does not let out a metric that the recipe wants", _POLICY),
    "policy-parameters": ("more would be trained than policy.max_trainable_parameters", _POLICY),
    "policy-privacy": ("the recipe's privacy is not what the policy asks for", _POLICY),
    "policy-rounds": ("the rounds are, or would be, more than policy.max_rounds", _MORE.format("max_rounds")),
    "policy-secure": ("policy.require_secure wants secure aggregation, and the recipe has none", _POLICY),
    "policy-sites": ("the recipe promises fewer sites than policy.min_sites", _POLICY),
    "policy-split": (
        "[privacy] or [split] of site.toml is another than when this recipe began here, so that patients who were "
        "tested would be trained on",
        "put the file back as it was: fedvfm doctor client SITE.toml names the values; or ask for another recipe",
    ),
    "policy-survey": (
        "a survey asks for statistics that policy.surveys does not name, or for more surveys than policy.max_surveys",
        "fedvfm client review {recipe} says what would leave; name it in policy.surveys, or leave it at that",
    ),
    "survey-difference": (
        "an earlier survey was answered of almost the same patients, and the difference would tell of the others",
        "wait until many more came or went, or ask for a survey with noise",
    ),
    "policy-task": ("the policy does not accept this task", _POLICY),
    "policy-training": (
        "optimiser, batch or number of steps would show single images in the update",
        "fedvfm client review {recipe} --policy SITE.toml shows optimisers, min_batch and steps",
    ),
    "went-back": (
        "the coordinator holds what this site's audit log does not: the state folder was put back to an earlier day, "
        "and what it sent and answered since is forgotten",
        "restore the newest copy; else ask the coordinator for another recipe, see Backup in client/README.md",
    ),
    "policy-units": (
        "there are fewer patients to train on than policy.min_train_units",
        "more patients, or a lower number",
    ),
    "privacy-budget": ("the round would spend more privacy than this site's budget has left", _LOG),
    "privacy-ledger": ("the privacy ledger cannot be charged, or the coordinator was put back to an older copy", _LOG),
    "refused": ("the message cannot be read, or is none of ours", "both ends need one release: fedvfm doctor client"),
    "roster-pending": (
        "no person here approved the roster document: who else's updates this site's may be summed with",
        "fedvfm client review {recipe} shows it; ask the people of those hospitals for their keys, then fedvfm client "
        "approve {recipe} --roster HASH",
    ),
    "secure-agreement": (
        "too few of the sites that are left signed for one and the same sum, so no key of a site that is gone left",
        "nothing, if the round is asked for again; else ask the coordinator why its sites were told unlike lists",
    ),
    "secure-aggregation": ("the update is to be hidden and cannot be hidden here", _LOG),
    "secure-base": (
        "the adapter came in another round before: two sums from one start differ by the update of a single site",
        "ask the coordinator: an honest round starts from what the one before ended with",
    ),
    "secure-numbers": ("the update has a number that is not finite, or its weight is out of bounds", _LOG),
    "secure-opened": (
        "shares for the sum of this round left already, for another session or other survivors",
        "ask the coordinator: one sum of a round is opened and no second one; another recipe begins anew",
    ),
    "secure-session": (
        "the session has too few sites, sites that are not on the approved roster document, or keys they did not sign",
        "ask the coordinator; fedvfm client review {recipe} shows the roster document",
    ),
    "secure-shares": (
        "the shares that came are not of this session, or were changed",
        "nothing; the next round has others",
    ),
    "secure-survivors": (
        "a sum was to be opened of too few sites, or of sites that dealt no shares",
        "nothing, if the round is asked for again; else ask the coordinator",
    ),
    "storage": ("the disk takes nothing more", "free space; fedvfm doctor client SITE.toml"),
    "training": ("the training went wrong; a loss that is not finite, or nothing moved", _LOG),
    "weights": ("the backbone's weights are missing or not the recipe's", "fedvfm weights fetch; fedvfm doctor client"),
}
"""Word of a refusal -> why, and what helps. ``{recipe}`` is the beginning of the recipe's hash."""
_OTHER = ("the installed release knows no more of it", _LOG)


def why(word: str, recipe: str) -> tuple[str, str]:
    """Why a message was refused with this word, and what helps.

    Args:
        word: of the refusal.
        recipe: hash of the recipe it was about; empty where it was about none.
    """
    reason, remedy = WORDS.get(word, _OTHER)
    return reason, remedy.format(recipe=recipe[:12] or "HASH")
