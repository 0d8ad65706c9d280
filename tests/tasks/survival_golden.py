"""Golden numbers of scikit-survival for drawn times, run by hand; the tests hold what it printed.

python3 -m venv /tmp/sksurv && /tmp/sksurv/bin/pip install scikit-survival==0.28.0
/tmp/sksurv/bin/python tests/tasks/survival_golden.py

It stands in no environment of ours: its solvers (ecos, osqp) are not needed for anything else.
"""

import json

import numpy as np

BINS = (6.0, 12.0, 24.0, 36.0)


def drawn(seed, whole):
    """Times, events and predicted survival of 80 cases; whole months have ties. Shapes: (80,), (80,), (80, 4)."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(0, 1, 80)
    happened, ended = rng.exponential(24 * np.exp(-risk)), rng.uniform(3, 60, 80)
    time, event = np.minimum(happened, ended), happened <= ended
    time = np.ceil(time) if whole else time
    guessed = 0.04 * np.exp(0.7 * risk + rng.normal(0, 0.5, 80))
    survival = np.exp(-guessed[:, None] * np.array(BINS))
    return time, event, np.round(survival, 2) if whole else survival


def described(seed, whole):
    """Features that a time depends on, and the times and events of :func:`drawn`. Shapes: (80, 3), (80,), (80,)."""
    time, event, _ = drawn(seed, whole)
    rng = np.random.default_rng(100 + seed)
    features = rng.normal(0, 1, (80, 3)) * (1.0, 20.0, 0.1) + (0.0, 50.0, 0.0)
    features[:, 0] -= 0.8 * np.log(time)
    return features, time, event


def main():
    """Prints a line of JSON a draw, and one a Cox regression of it."""
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.metrics import concordance_index_censored, concordance_index_ipcw, integrated_brier_score
    from sksurv.nonparametric import kaplan_meier_estimator
    from sksurv.util import Surv

    for seed, whole in ((0, False), (1, True), (2, True)):
        time, event, survival = drawn(seed, whole)
        risk, truth = 1 - survival.mean(axis=1), Surv.from_arrays(event, time)
        at, chance = kaplan_meier_estimator(event, time)
        print(
            json.dumps(
                {
                    "one_minus_ibs": 1 - integrated_brier_score(truth, truth, survival, BINS),
                    "c_index": concordance_index_censored(event, time, risk)[0],
                    "c_index_uno": concordance_index_ipcw(truth, truth, risk, tau=BINS[-1])[0],
                    "calibration_error": float(survival[:, -1].mean() - chance[at <= BINS[-1]][-1]),
                }
            )
        )
        features, time, event = described(seed, whole)
        inputs, truth = (features - features.mean(0)) / features.std(0), Surv.from_arrays(event, time)
        for alpha in (0.0, 1.0):
            fitted = CoxPHSurvivalAnalysis(alpha=alpha, ties="efron", n_iter=500, tol=1e-12).fit(inputs, truth)
            risk = fitted.predict(inputs)
            line = {
                "alpha": alpha,
                "weight": fitted.coef_.tolist(),
                "c_index": concordance_index_censored(event, time, risk)[0],
                "c_index_uno": concordance_index_ipcw(truth, truth, risk, tau=BINS[-1])[0],
                "survival of the first": fitted.predict_survival_function(inputs[:1])[0](BINS).tolist(),
            }
            print(json.dumps(line))


if __name__ == "__main__":
    main()
