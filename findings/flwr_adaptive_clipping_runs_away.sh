#!/usr/bin/env bash
# Flower's adaptive clipping moves the clip away from the updates' norms, and adds noise by a clip not yet used.
#
# Adaptive clipping (Andrew et al., "Differentially Private Learning with Adaptive Clipping", 2021, algorithm 1) lets the
# clip follow a quantile of the updates' norms: clip *= exp(-rate * (share of updates within the clip - quantile)).
# Flower's strategies count the updates that were *clipped* and put that share into the same formula. Its sign is thus
# reversed: where all updates are longer than the clip it shrinks, where none is it grows, round for round without end.
# The new clip is set before the noise of the round is drawn, so that the noise is not noise_multiplier times the clip
# that bounded the updates.
#
# Guess before the run: from 1 the clip rises towards updates of norm 10 and falls towards updates of norm 0.01; noise of
# multiplier 1 over four clients has a standard deviation of a quarter of the clip by which they were clipped.
# Seen with flwr 1.42.0: 0.135 after 20 rounds of updates of norm 10, 7.39 after 20 of norm 0.01; at a high rate, where
# the clip goes from 1 to about 0.4 in a round, the noise of that round is about 0.4 of what its clip asks for.
#
# The server's strategy as it is, with replies made here. The strategy for clipping at the clients has both as well.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install flwr==1.42.0
cat > "$work/clip.py" <<'PYTHON'
import logging
import math
import sys
from importlib.metadata import version

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.CRITICAL)
TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
CLIENTS, LENGTH = 4, 40_000


def clips(norm, rounds, **options):
    """Every client sends an update of this norm in each round.

    Returns:
        The clip after each round, the last mean with its noise, and the multiplier of that noise.
    """
    strategy = DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(), num_sampled_clients=CLIENTS, initial_clipping_norm=1.0, target_clipped_quantile=0.5, **options
    )
    strategy.current_arrays = ArrayRecord({"weight": Array(np.zeros(LENGTH))})
    after = []
    for number in range(1, rounds + 1):
        update = np.full(LENGTH, norm / math.sqrt(LENGTH))
        replies = [
            Message(
                RecordDict(
                    {
                        "arrays": ArrayRecord({"weight": Array(update)}),
                        "metrics": MetricRecord({"num-examples": 1}),
                    }
                ),
                dst_node_id=client,
                message_type="train",
            )
            for client in range(CLIENTS)
        ]
        arrays, _ = strategy.aggregate_train(number, replies)
        after.append(strategy.clipping_norm)
    return after, arrays["weight"].numpy(), strategy.noise_multiplier


print(f"flwr {version('flwr')}: clip 1 at the start, quantile 0.5")
longer, _, _ = clips(10.0, 20, noise_multiplier=0.0)
shorter, _, _ = clips(0.01, 20, noise_multiplier=0.0)
print(f"all updates of norm 10:   after rounds 1, 10, 20 {longer[0]:.3f}, {longer[9]:.3f}, {longer[19]:.3f}")
print(f"all updates of norm 0.01: after rounds 1, 10, 20 {shorter[0]:.3f}, {shorter[9]:.3f}, {shorter[19]:.3f}")
# Noise on the sum needs noise on the count; a high rate moves the clip far in one round.
after, noisy, multiplier = clips(10.0, 1, noise_multiplier=1.0, clip_norm_lr=2.0, clipped_count_stddev=0.6)
deviation = float(noisy.std())
print(f"one round with noise: clipped by 1, the next clip is {after[0]:.4f}; noise of multiplier {multiplier:.4f}")
by_used, by_next = multiplier / CLIENTS, multiplier * after[0] / CLIENTS
print(f"its standard deviation: {deviation:.4f}; by the clip used {by_used:.4f}, by the next clip {by_next:.4f}")
away = longer[19] < 0.2 and shorter[19] > 5
sys.exit(0 if away and abs(deviation - by_next) < 0.02 * deviation and abs(after[0] - 1) > 0.05 else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/clip.py"
