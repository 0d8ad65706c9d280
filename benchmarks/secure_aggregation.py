"""Secure aggregation alone, without network and training: computing time at a site and at the coordinator, and bytes.

    python benchmarks/secure_aggregation.py [--sites 6 50] [--numbers 1000000] [--dropouts 1] [--json]

Sites compute at the same time on machines of their own, so what a round waits for is the slowest site's time and the
coordinator's; "all sites" is what one machine takes that plays all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fedvfm.secure_aggregation import fixed_point, masks, opening, participant, round_keys
from fedvfm.secure_aggregation import session as sessions
from fedvfm.state import state
from fedvfm.trust import keys

POINT = fixed_point.FixedPoint(10.0, 1_000_000)


class Clock:
    """Seconds by who spent them."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def of(self, who: str, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; its time is noted."""
        started = time.perf_counter()
        result = work()
        self.spent[who] = self.spent.get(who, 0.0) + time.perf_counter() - started
        return result


def measure(number: int, size: int, dropouts: int) -> dict[str, Any]:
    """One session of ``number`` sites, of which some drop out after they dealt."""
    clock, names = Clock(), sorted(f"site {index:02d}" for index in range(number))
    rng = np.random.default_rng(0)
    start = state.AdapterState({"w": rng.normal(size=size).astype("f4")})
    own = {name: keys.make() for name in names}
    public = {name: key.public_key() for name, key in own.items()}
    secrets = {name: clock.of(name, round_keys.fresh) for name in names}

    def verified(site: str, signature: str, message: bytes) -> bool:
        return keys.verified(public[site], signature, message)

    def advertise(name: str) -> round_keys.Advertised:
        return round_keys.advertise(secrets[name], name, "a" * 64, lambda text: keys.sign(own[name], text))

    members = tuple(clock.of(name, lambda name=name: advertise(name)) for name in names)
    threshold = sessions.least_threshold(number, 1)
    session = sessions.Session("a" * 64, 1, start.fingerprint, "c" * 64, threshold, members)
    dealt, held = {}, {}
    for name in names:
        clock.of(name, lambda: sessions.require_signed(session, verified))
        dealt[name] = clock.of(name, lambda name=name: participant.deal(session, name, secrets[name]))
    for name in names:
        inbox = {peer: dealt[peer].outbox[name] for peer in names if peer != name}
        held[name] = clock.of(
            name,
            lambda name=name, inbox=inbox: participant.received(session, name, secrets[name], dealt[name], inbox),
        )
    survivors, total, plain = names[: number - dropouts], np.zeros(size + 3, np.uint64), np.zeros(size + 3, np.uint64)

    def masked(name: str, after: state.AdapterState) -> tuple[masks.Numbers, masks.Numbers]:
        whole = POINT.encode(after, start, ("w",), 100, 0.5)
        return whole, participant.masked(session, name, secrets[name], dealt[name], names, whole, 3)

    for name in survivors:
        after = state.AdapterState({"w": start["w"] + 1e-4 * rng.normal(size=size).astype("f4")})
        whole, sent = clock.of(name, lambda name=name, after=after: masked(name, after))
        clock.of("coordinator", lambda sent=sent: np.add(total, sent, out=total))
        plain += whole
    answers = {
        name: clock.of(name, lambda name=name: participant.revealed(session, name, held[name], survivors, 3))
        for name in survivors
    }
    seals = {name: dealt[name].commitment for name in names}
    opened = clock.of("coordinator", lambda: opening.opened(session, names, survivors, total, answers, seals))
    if not np.array_equal(opened, plain):
        raise SystemExit("the opened sum is not the plain one")
    clock.of("coordinator", lambda: POINT.decode(opened, start, ("w",), len(survivors)))
    own_s = [clock.spent[name] for name in names]
    return {
        "sites": number,
        "numbers": size,
        "dropouts": dropouts,
        "threshold": threshold,
        "slowest_site_s": round(max(own_s), 3),
        "coordinator_s": round(clock.spent["coordinator"], 3),
        "round_s": round(max(own_s) + clock.spent["coordinator"], 3),
        "all_sites_s": round(sum(own_s), 3),
        "masked_bytes": 8 * (size + fixed_point.TAIL),
        "fp32_bytes": 4 * size,
        "share_bytes_per_site": (number - 1) * participant.ENVELOPE,
    }


def main() -> None:
    """Print a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[6, 50])
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--dropouts", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    for number in asked.sites:
        row = measure(number, asked.numbers, asked.dropouts)
        print(json.dumps(row) if asked.json else "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
